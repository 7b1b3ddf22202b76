import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from moss_train.commands import doctor
from moss_train.commands.doctor import Finding
from moss_train.config.schema import DoctorConfig

ROOT = Path(__file__).resolve().parent.parent.parent
PROGRAM = """
import sys
from moss_train.commands import doctor
from moss_train.config.schema import DoctorConfig
sys.exit(doctor.run(DoctorConfig(run_dir=sys.argv[1], min_free_disk_gb=float(sys.argv[2]))))
"""


def run_doctor(run_directory, min_free_disk_gb=0.0, path=()):
    """Run the command in its own process, with extra folders before the installed packages on the path."""
    program = f"import sys; sys.path[:0] = {[str(p) for p in path]!r}\n{PROGRAM}"
    command = [sys.executable, "-c", program, str(run_directory), str(min_free_disk_gb)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_healthy_environment_exits_with_0(tmp_path, capsys):
    settings = DoctorConfig(run_dir=str(tmp_path / "not" / "there" / "yet"), min_free_disk_gb=0.0)
    status = doctor.run(settings)
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert "Everything that is needed works." in printed
    assert "broken" not in printed
    for subject in (*doctor.CORE_PACKAGES, "CPU cores", "memory", "run directory", "libsndfile", "FlashAttention"):
        assert subject in printed
    assert not (tmp_path / "not").exists()


@pytest.mark.processes
def test_packages_whose_import_fails_are_reported_and_nothing_crashes(tmp_path):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "torchaudio.py").write_text("raise RuntimeError('built with CUDA 13.2, torch with 13.0\\nsecond line')")
    (broken / "soundfile.py").write_text("raise OSError('sndfile library not found')")
    (broken / "pystoi.py").write_text("import no_such_module")
    result = run_doctor(tmp_path, path=[broken])
    assert result.returncode == 1
    assert "RuntimeError" in result.stdout
    assert "second line" not in result.stdout
    advice = {line.partition(": ")[0]: line for line in result.stdout.splitlines() if ": " in line}
    assert "different CUDA releases" in advice["torchaudio"]
    assert "requirements.lock" in advice["torchaudio"]
    assert "libsndfile" in advice["soundfile"]
    assert "moss_train[eval]" in advice["pystoi (eval)"]
    assert "Everything that is needed works." not in result.stdout
    assert result.stderr.count("Traceback") == 0


def test_little_free_disk_is_advice_and_not_an_error(tmp_path):
    (finding,) = (f for f in doctor.disk_findings(tmp_path, 1e18) if f.subject == "run directory")
    assert not finding.broken
    assert "1000000000 GB" in finding.advice
    assert "run_dir=" in finding.advice


def test_temporary_files_on_the_same_file_system_are_recognised(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    findings = {f.subject: f for f in doctor.disk_findings(tmp_path / "runs", 0.0)}
    assert "the same file system" in findings["temporary files"].found
    assert str(tmp_path) in findings["run directory"].found


def test_run_directory_below_a_file_uses_the_nearest_directory(tmp_path):
    (tmp_path / "file").write_text("")
    assert doctor.nearest_directory(tmp_path / "file" / "runs") == tmp_path


def test_missing_core_package_is_broken():
    finding = doctor.package_finding("no-such-distribution", "no_such_module")
    assert finding == Finding("no-such-distribution", "not installed", doctor.INSTALL_LOCK, broken=True)


@pytest.mark.parametrize(("version", "broken"), [("2.14.1", False), ("2.10.0", True), ("2.15.0", True)])
def test_version_outside_the_declared_range_is_broken(version, broken, monkeypatch):
    if doctor.declared_versions("torch") is None:
        pytest.skip("moss_train is not installed, so it declares no versions")
    monkeypatch.setattr(doctor, "package_version", lambda distribution: version)
    finding = doctor.package_finding("torch", "torch")
    assert finding.broken is broken
    assert ("<2.15" in (finding.advice or "")) is broken


def test_status_depends_on_broken_findings_alone(capsys):
    doctor.show([Finding("a", "[x]"), Finding("b", "2", "do this")], Console(width=60))
    output = capsys.readouterr().out
    assert "[x]" in output
    assert "b: do this" in output
    assert output.endswith("Everything that is needed works.\n")
