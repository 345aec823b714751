"""The device table is complete and sane, users extend it, and bad figures are refused by name."""

import pickle
import subprocess
import sys

import pytest

from remat.cost.devices import KINDS, Device, find_device, load_devices
from remat.errors import DeviceError, RematError

NEW_ROW = """
schema_version = 1
[device.Toy-1]
kind = "cuda"
memory_bytes = 8e9
bandwidth_bytes_per_s = 100e9
source = "made up for a test"
[device.Toy-1.flops]
float32 = 1e12
"""


@pytest.fixture
def write(tmp_path):
    """Write a device table and return its path."""

    def write_table(text):
        path = tmp_path / "my_devices.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_table


def test_load_devices_package_table_has_the_named_devices():
    """Common CPUs and GPUs are there, each with its source and a year in it."""
    devices = load_devices()
    assert {
        "cpu",
        "cpu-server",
        "Apple-M3-Max",
        "T4",
        "L4",
        "A10G",
        "A100-40GB",
        "A100-80GB",
        "H100-80GB",
        "H200",
        "RTX-3090",
        "RTX-4090",
        "MI300X",
        "V100-16GB",
        "V100-32GB",
    } <= set(devices)
    for name, device in devices.items():
        assert device.name == name
        assert "20" in device.source
        assert device.kind in KINDS


def test_load_devices_faster_dtypes_are_not_slower():
    """A narrower float is never slower than float32 on the same device, float64 never faster."""
    for device in load_devices().values():
        for dtype in ("tf32", "bfloat16", "float16"):
            assert device.flops_for(dtype) >= device.flops_for("float32"), device.name
        if "float64" in device.flops:
            assert device.flops["float64"] < device.flops["float32"], device.name


def test_find_device_cpu_is_the_reference_machine():
    """The default device has the constants that the published figures were computed with."""
    cpu = find_device("cpu")
    assert cpu.flops_for("float32") == 100e9
    assert cpu.bandwidth_bytes_per_s == 10e9
    assert cpu.op_overhead_s == 5e-6
    assert cpu.region_overhead_s == 155e-6
    assert cpu.saved_tensor_overhead_s == 11e-6


def test_flops_for_unlisted_dtype_is_the_rate_of_float32():
    """A dtype without a figure of its own, integers among them, is priced as float32."""
    assert find_device("T4").flops_for("bfloat16") == find_device("T4").flops_for("float32")
    assert find_device("cpu").flops_for("int64") == 100e9


@pytest.mark.parametrize("kind", KINDS)
def test_find_device_kind_names_a_device_of_that_kind(kind):
    """The kind that PyTorch reports stands for its usual device."""
    assert find_device(kind).kind == kind


def test_find_device_letter_case_does_not_matter():
    """`h200` is the H200."""
    assert find_device("h200") == find_device("H200")


@pytest.mark.parametrize(
    ("asked", "offered"),
    [("A100", "A100-80GB"), ("H10O-80GB", "H100-80GB"), ("rtx4090", "RTX-4090")],
)
def test_find_device_unknown_name_offers_the_nearest(asked, offered):
    """A slip of the pen is answered with what was probably meant."""
    with pytest.raises(DeviceError, match=f"Did you mean .*{offered}") as caught:
        find_device(asked)
    assert repr(asked) in str(caught.value)
    assert isinstance(caught.value, RematError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("asked", ["", "quantum", 3, None])
def test_find_device_hopeless_name_is_one_clear_error(asked):
    """A name near to none lists them all; something that is no name is said to be none."""
    with pytest.raises(DeviceError, match=r"Known: cpu, |is not a name"):
        find_device(asked)


def test_find_device_user_file_adds_a_device(write):
    """A row of a user's own is found beside those of the package, with default overheads."""
    path = write(NEW_ROW)
    toy = find_device("toy-1", path)
    assert toy.memory_bytes == 8_000_000_000
    assert isinstance(toy.memory_bytes, int)
    assert toy.region_overhead_s == 155e-6
    assert find_device("A100-80GB", path) == find_device("A100-80GB")


def test_load_devices_user_file_overrides_single_figures(write):
    """Overriding one figure leaves the others as they are in the package's table."""
    path = write("schema_version = 1\n[device.T4]\nflops.float16 = 40e12\nop_overhead_s = 9e-6\n")
    ours, theirs = load_devices()["T4"], load_devices(path)["T4"]
    assert theirs.flops == {**ours.flops, "float16": 40e12}
    assert theirs.op_overhead_s == 9e-6
    assert theirs.memory_bytes == ours.memory_bytes


def test_load_devices_user_file_sets_the_default_of_a_kind(write):
    """`default_by_kind` says which row stands for CUDA here."""
    path = write(NEW_ROW + '[default_by_kind]\ncuda = "Toy-1"\n')
    assert find_device("cuda", path).name == "Toy-1"
    assert find_device("cpu", path).name == "cpu"


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ("memory_bytes = 0", "memory_bytes is 0"),
        ("memory_bytes = -1", "memory_bytes is -1"),
        ("memory_bytes = true", "memory_bytes is True"),
        ("memory_bytes = 1.5", "memory_bytes is 1.5"),
        ("memory_bytes = nan", "memory_bytes is nan"),
        ("memory_bytes = 11_000_000_000_000", "memory_bytes is 11000000000000"),
        ('memory_bytes = "8GB"', "memory_bytes is '8GB'"),
        ("bandwidth_bytes_per_s = 0", "bandwidth_bytes_per_s is 0"),
        ("bandwidth_bytes_per_s = 2e14", "bandwidth_bytes_per_s is"),
        ("bandwidth_bytes_per_s = inf", "bandwidth_bytes_per_s is inf"),
        ("bandwidth_bytes_per_s = false", "bandwidth_bytes_per_s is False"),
        ("flops.float32 = nan", "flops.float32 is nan"),
        ("flops.float32 = -1e12", "flops.float32 is"),
        ("flops.bfloat16 = 2e17", "flops.bfloat16 is"),
        ("flops.bfloat16 = true", "flops.bfloat16 is True"),
        ("flops.bf16 = 1e12", "flops.bf16 is not a known dtype"),
        ("flops = 3", "flops must be a table"),
        ("op_overhead_s = -1e-6", "op_overhead_s is"),
        ("op_overhead_s = 2", "op_overhead_s is 2"),
        ("region_overhead_s = nan", "region_overhead_s is nan"),
        ('kind = "tpu"', "kind is 'tpu'"),
        ("source = 2024", "source must be text"),
        ('alloc_conf = "max_split_size_mb:8"', "max_split_size_bytes is 8388608"),
        ('alloc_conf = "expandable_segments:yes"', "expected True or False"),
        ('alloc_conf = "speed:9"', "allocator setting 'speed:9' is not modelled"),
        ('alloc_conf = "per_process_memory_fraction:2"', "per_process_memory_fraction is 2.0"),
        ("memory_gb = 16", r"device.T4.memory_gb is not a known field"),
    ],
)
def test_load_devices_absurd_figure_is_refused_with_file_device_and_field(write, line, field):
    """Each figure that no device has is named with its file and device."""
    path = write(f"schema_version = 1\n[device.T4]\n{line}\n")
    with pytest.raises(DeviceError, match=field) as caught:
        load_devices(path)
    assert str(path) in str(caught.value)
    assert "T4" in str(caught.value)


@pytest.mark.parametrize(
    "field", ["kind", "memory_bytes", "bandwidth_bytes_per_s", "source", "float32", "flops"]
)
def test_load_devices_new_device_missing_figure_is_refused(write, field):
    """A device that is not in the package's table must state every figure itself."""
    kept = [line for line in NEW_ROW.splitlines() if not line.startswith(field)]
    if field == "flops":
        kept = [line for line in kept if "flops" not in line and "float32" not in line]
    path = write("\n".join(kept))
    with pytest.raises(DeviceError, match=f"{field} is missing") as caught:
        load_devices(path)
    assert str(path) in str(caught.value)
    assert "Toy-1" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "schema_version None"),
        ("schema_version = 2\n", "schema_version 2"),
        ("schema_version = true\n", "schema_version True"),
        ("schema_version = 1\n[gpu.T4]\n", "gpu is not a known field"),
        ("schema_version = 1\ndevice = 3\n", "device must be a table"),
        ("schema_version = 1\n[device]\nT4 = 3\n", "device.T4 must be a table"),
        ("schema_version = 1\n[default_by_kind]\ncuda = 'Nix'\n", "'Nix', which is no device"),
        ("schema_version = 1\n[default_by_kind]\ntpu = 'T4'\n", "default_by_kind.tpu"),
        ("schema_version = ", "damaged: not TOML"),
    ],
)
def test_load_devices_malformed_file_is_refused_by_path(write, text, problem):
    """A file of another form is refused with its name and the place in it."""
    path = write(text)
    with pytest.raises(DeviceError, match=problem) as caught:
        load_devices(path)
    assert str(path) in str(caught.value)


def test_load_devices_unreadable_file_is_one_clear_error(tmp_path):
    """A missing file, a directory and bytes that are no text are named, without a trace."""
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    for path in (tmp_path / "none.toml", tmp_path, binary):
        with pytest.raises(DeviceError, match="cannot be read") as caught:
            load_devices(path)
        assert str(path) in str(caught.value)


def test_device_made_in_code_is_checked_as_well():
    """A row built without a file obeys the same limits, and is frozen."""
    with pytest.raises(DeviceError, match=r"flops\.float32 is missing"):
        Device(name="mine", memory_bytes=1, bandwidth_bytes_per_s=1.0, flops={})
    with pytest.raises(DeviceError, match="memory_bytes is 0"):
        Device(name="mine", memory_bytes=0, bandwidth_bytes_per_s=1.0, flops={"float32": 1.0})
    device = find_device("L4")
    with pytest.raises(AttributeError):
        device.memory_bytes = 1
    assert pickle.loads(pickle.dumps(device)) == device


def test_devices_module_does_not_load_torch():
    """The table is plain data: reading it stays fast."""
    code = (
        "import sys; from remat.cost.devices import load_devices; load_devices();"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
