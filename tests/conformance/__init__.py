"""What users of gradient checkpointing hit, each as a case: right, refused or kept."""
