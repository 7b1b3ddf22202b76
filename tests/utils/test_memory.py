import pytest

from moss_train.utils.memory import Memory, available_memory_bytes, memory

MEMINFO = "MemTotal:  8192 kB\nMemFree:  100 kB\nMemAvailable:  4096 kB\n"


@pytest.fixture
def machine(tmp_path):
    """Create a proc and a control-group file system in which the process is in the group /job/step."""
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (groups / "job/step").mkdir(parents=True)
    (proc / "meminfo").write_text(MEMINFO)
    (proc / "self/cgroup").write_text("4:memory:/other\n0::/job/step\n")
    return proc, groups


def limit(group, maximum, current, inactive=0):
    (group / "memory.max").write_text(f"{maximum}\n")
    (group / "memory.current").write_text(f"{current}\n")
    (group / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\n")


def test_this_machine_has_memory():
    found = memory()
    assert 0 < found.available <= found.total
    assert available_memory_bytes() > 0


def test_without_limits_the_machine_counts(machine):
    limit(machine[1] / "job/step", "max", 12345)
    assert memory(*machine) == Memory(available=4096 * 1024, total=8192 * 1024)


def test_own_limit_counts_and_file_cache_does_not(machine):
    limit(machine[1] / "job/step", 1_000_000, 700_000, inactive=200_000)
    assert memory(*machine) == Memory(available=500_000, total=1_000_000)


def test_limit_of_a_group_above_counts(machine):
    limit(machine[1] / "job", 300_000, 350_000)
    assert memory(*machine) == Memory(available=0, total=300_000)


def test_limit_above_the_machine_changes_nothing(machine):
    limit(machine[1] / "job", 10**15, 0)
    assert memory(*machine) == Memory(available=4096 * 1024, total=8192 * 1024)


def test_without_proc_sysconf_answers(tmp_path):
    found = memory(tmp_path / "none", tmp_path / "none")
    assert 0 < found.available <= found.total
