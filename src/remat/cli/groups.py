"""A command with commands inside: without the name of one of them, the first is meant."""

from __future__ import annotations

from typing import Any

from typer.core import TyperGroup

# Any: the context is click's or typer's own copy of it, by version.
DEFAULT = "default"


class DefaultGroup(TyperGroup):
    """Runs its command `default` where the first word names no other: `remat runs --json`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the name of the default command where none is given, before anything is parsed."""
        if not args or args[0] not in self.commands:
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        """Find the command, and leave the default one's name out of usage and help."""
        name, command, rest = super().resolve_command(ctx, args)
        return (None if name == DEFAULT else name), command, rest
