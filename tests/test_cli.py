import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import moss_train
from moss_train import load_config
from moss_train.cli.help import find_commands
from moss_train.cli.main import main
from moss_train.config.schema import check_inputs
from moss_train.utils.errors import ConfigError, UserError

ROOT = Path(__file__).parents[1]
PACK = ["pack", "input=in", "out=out"]


def run_program(*arguments, cwd):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "moss_train", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


# Help


def test_help_lists_every_command_with_its_summary(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    commands = find_commands()
    assert {"pack", "doctor", "encode", "decode"} <= commands.keys()
    for command, summary in commands.items():
        assert summary
        assert f"{command}" in text
        assert summary in text


def test_no_command_prints_the_help_to_stderr_with_status_2(capsys):
    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Usage: python -m moss_train <command>" in captured.err


@pytest.mark.parametrize("arguments", [["encode", "--help"], ["--help", "encode"], ["encode", "input=x", "-h"]])
def test_help_of_a_command_shows_its_commented_yaml_and_examples(capsys, arguments):
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert text.startswith(find_commands()["encode"])
    assert "batch_seconds: 120     # padded audio per batch; lower it when memory runs out" in text
    assert "python -m moss_train encode model=my-tokenizer input=/my/audio" in text
    assert "data.train=/shards/{speech,music}" in text


def test_examples_name_the_mandatory_values(capsys):
    assert main(["pack", "--help"]) == 0
    assert "python -m moss_train pack input=<input> out=<out>" in capsys.readouterr().out


def test_help_of_fit_lists_the_experiments(capsys):
    assert main(["fit", "--help"]) == 0
    text = capsys.readouterr().out
    for path in (ROOT / "configs/experiment").glob("*.yaml"):
        assert f"\n  {path.stem}" in text


@pytest.mark.processes
def test_help_needs_no_heavy_import():
    code = (
        "import sys; from moss_train.cli.main import main; main(['--help']); main(['pack', '--help']);"
        "print('HEAVY', sorted({'torch', 'hydra', 'numpy', 'transformers', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "HEAVY []"


# Composition


def test_cfg_job_prints_the_composed_configuration_without_running(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["pack", "out=shards", "min_seconds=0.5", "--cfg", "job"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["min_seconds"] == 0.5
    assert config["out"] == "shards"
    assert config["input"] == "???"
    assert list(tmp_path.iterdir()) == []


def test_plain_configuration_reaches_the_command_again_and_again():
    for rate in (16000, 48000):
        config = load_config("pack", ["input=a", "out=b", f"sampling_rate={rate}"])
        assert config.sampling_rate == rate


def test_a_file_of_config_dir_that_would_have_no_effect_is_refused(error_line, tmp_path):
    (tmp_path / "pack.yaml").write_text("sampling_rate: 1\n")
    line = error_line([*PACK, "--config-dir", str(tmp_path)])
    assert line.startswith(f"moss_train pack: {tmp_path}/pack.yaml has the name of a shipped configuration")


def test_own_experiment_of_a_config_dir(capsys, tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text("# @package _global_\n# Mine.\nseed: 7\n")
    assert main(["fit", "--config-dir", str(tmp_path), "experiment=mine", "--cfg", "job"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["seed"] == 7
    assert main(["fit", "--config-dir", str(tmp_path), "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert ["mine", "Mine."] in [line.split() for line in lines]


# Paths


def test_repeated_path_keys_become_a_list():
    given = ["data.train=/shards/speech", "seed=1", "data.train=/shards/music (live)", "data.train=/s/it's"]
    config = load_config("fit", ["experiment=cat_tiny", *given])
    assert config.data.train == ["/shards/speech", "/shards/music (live)", "/s/it's"]


def test_of_a_repeated_key_that_is_no_list_the_last_counts():
    assert load_config("pack", ["input=i", "out=a", "out=b"]).out == "b"


@pytest.mark.parametrize(
    "name", ["a b (1)", "x=y", "one,two", "ünï 音", "it's", 'say "x"', "[list]", "${seed}", "50%", "a:b"]
)
def test_existing_paths_with_special_characters_arrive_as_they_are(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    for path in (folder, folder / "new out"):
        config = load_config("pack", [f"input={path}", "out=o"])
        assert config.input == str(path)
    config = load_config("encode", ["model=m", "out=o", f"input={folder}", f"input={tmp_path}"])
    assert config.input == [str(folder), str(tmp_path)]


def test_home_folder_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone else")
    config = load_config("pack", ["input=~/audio", "out=~"])
    assert (config.input, config.out) == ("/home/someone else/audio", "/home/someone else")


def test_numbers_and_lists_keep_their_types(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "16000").mkdir()
    config = load_config("encode", ["model=m", "input=[a,b]", "out=o", "batch_seconds=16000", "num_quantizers=null"])
    assert (config.batch_seconds, config.input, config.num_quantizers) == (16000, ["a", "b"], None)


# Errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pakc"], "moss_train: unknown command 'pakc': did you mean pack?"),
        ([*PACK, "sampling_rat=3"], "moss_train pack: unknown key 'sampling_rat': did you mean sampling_rate?"),
        ([*PACK, "pack.overwrite=3"], "moss_train pack: unknown key 'pack.overwrite': did you mean overwrite?"),
        ([*PACK, "~nothing"], "moss_train pack: unknown key 'nothing': the keys are"),
        ([*PACK, "overwrite"], "moss_train pack: 'overwrite': write overwrite=<value>"),
        ([*PACK, "=3"], "moss_train pack: '=3': write key=<value>"),
        ([*PACK, "hydra.run.dir=x"], "moss_train pack: 'hydra.run.dir=x': settings of Hydra have no effect"),
        (["pack"], "moss_train pack: input, out is required: add input=<input> out=<out>"),
        (["pack", "out=x"], "moss_train pack: input is required: add input=<input>"),
        ([*PACK, "domain=${nope.x}"], "moss_train pack: domain: Interpolation key 'nope.x' not found"),
        ([*PACK, "domain=${oc.env:NOT_SET_X}"], "moss_train pack: domain: KeyError raised while resolving"),
        ([*PACK, "--verbose"], "moss_train pack: unrecognized arguments: --verbose"),
        ([*PACK, "--cfg", "all"], "moss_train pack: argument --cfg: invalid choice: 'all'"),
        ([*PACK, "--config-dir", "/no/folder"], "moss_train pack: --config-dir /no/folder is not a folder"),
        (
            ["fit", "experiment=nope_nope"],
            "moss_train fit: experiment=nope_nope has to be a file of configs/experiment",
        ),
        (["fit"], "moss_train fit: experiment is required: add experiment=<name>; there are cat_1b6, "),
        (
            ["fit", "experimnt=x", "experiment=cat_1b6"],
            "moss_train fit: unknown key 'experimnt': did you mean experiment?",
        ),
        (
            ["fit", "experiment=cat_1b6", "data.trian=x"],
            "moss_train fit: unknown key 'data.trian': did you mean data.train?",
        ),
        (
            ["fit", "experiment=cat_1b6", "experiment=cat_tiny"],
            "moss_train fit: experiment=cat_tiny is not the only experiment: choose one",
        ),
        (
            ["fit", "experiment=3"],
            "moss_train fit: experiment=3 has to be a file of configs/experiment",
        ),
        (
            ["fit", "experiment=cat_1b6", "objetive.weights.semantic=3"],
            "moss_train fit: unknown key 'objetive.weights.semantic': did you mean objective.weights.semantic?",
        ),
        (["fit", "experiment=cat_1b6", "stages=3"], "moss_train fit: stages=3 has to be a list: write stages=[3]"),
        (
            ["fit", "experiment=cat_1b6", "stages.7.updates=3", "stages.7.batch_seconds=3"],
            "moss_train fit: unknown key 'stages.7': stages has the entries 0 to 1 (see --cfg job)",
        ),
        (["fit", "experiment=cat_1b6", "seed=1", "stages.99.updates=3"], "moss_train fit: unknown key 'stages.99'"),
        (
            ["fit", "experiment=cat_1b6", "trainer.nope=3"],
            "moss_train fit: unknown key 'trainer.nope': the keys of tra",
        ),
        (["fit", "experiment=cat_1b6", "data=3"], "moss_train fit: data=3 holds several values, not one: set data."),
    ],
)
def test_wrong_input_is_one_line_with_status_2(error_line, arguments, message):
    assert error_line(arguments).startswith(message)


def test_unknown_experiment_lists_those_there_are(error_line):
    line = error_line(["fit", "experiment=nope_nope"])
    for path in (ROOT / "configs/experiment").glob("*.yaml"):
        assert path.stem in line


def test_user_errors_of_a_command(error_line, tmp_path):
    line = error_line(["pack", f"input={tmp_path}/nowhere", f"out={tmp_path}/out"])
    assert line.startswith(f"moss_train pack: input={tmp_path}/nowhere does not exist")
    line = error_line(["encode", f"model={tmp_path}", f"input={tmp_path}", "out=o", "batch_seconds=0"])
    assert line == "moss_train encode: batch_seconds=0 has to be a number above 0"


def test_traceback_on_request(capsys):
    assert main([*PACK, "sampling_rat=3", "--traceback"]) == 2
    text = capsys.readouterr().err
    assert text.startswith("Traceback")
    assert text.endswith("moss_train pack: unknown key 'sampling_rat': did you mean sampling_rate?\n")


@pytest.mark.processes
def test_program_exits_with_status_2_and_no_traceback(tmp_path):
    done = run_program("pack", "input=nowhere", "out=out", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("moss_train pack: input=nowhere does not exist")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


REFUSED = {
    "fit experiment=finetune init=my-tokenizer data.path=.": "init=my-tokenizer does not exist in ",
    "fit experiment=cat_tiny data.train=[.,gone]": "data.train=gone does not exist: give folders that `moss_t",
    "fit experiment=cat_tiny semantic.pretrained=./gone": "semantic.pretrained=./gone does not exist",
    "evaluate model=runs/x data=. out=o": "model=runs/x does not exist in ",
    "encode model=. input=[.,gone.wav] out=o": "input=gone.wav does not exist: give a folder of audio files",
}
PROGRAM = """
import sys
from moss_train.cli.main import main
print([main(arguments.split()) for arguments in sys.argv[1:]], {"torch", "lightning"} & set(sys.modules))
"""


@pytest.mark.processes
def test_inputs_that_are_not_there_are_refused_before_anything_heavy_is_imported(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, *REFUSED]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"{[2] * len(REFUSED)} set()\n", done.stderr
    for line, message in zip(done.stderr.splitlines(), REFUSED.values(), strict=True):
        assert message in line


def test_a_run_that_has_begun_needs_its_inputs_no_more(tmp_path):
    config = load_config("fit", ["experiment=finetune", f"run_dir={tmp_path / 'run'}", "init=gone", "data.path=gone"])
    with pytest.raises(ConfigError) as caught:
        check_inputs(config)
    assert (caught.value.kind, caught.value.path, caught.value.value) == ("missing", "init", "gone")
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    check_inputs(config)


def test_only_what_can_read_from_a_server_takes_an_address(tmp_path):
    address, model = "https://host/shards", ["model=owner/name", f"out={tmp_path / 'out'}"]
    check_inputs(load_config("fit", ["experiment=cat_tiny", f"data.train={address}", f"run_dir={tmp_path}"]))
    check_inputs(load_config("inspect", [f"shards={address}", f"out={tmp_path / 'out'}"]))
    for command, key, options in (
        ("fit", "validation.data", ["experiment=cat_tiny", f"data.train={address}", f"run_dir={tmp_path}"]),
        ("evaluate", "data", model),
        ("encode", "shards", model),
        ("encode", "input", model),
        ("pack", "input", [f"out={tmp_path / 'out'}"]),
    ):
        with pytest.raises(ConfigError, match=r"only data\.train and inspect read from servers") as caught:
            check_inputs(load_config(command, [*options, f"{key}={address}"]))
        assert caught.value.path == key


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"moss_train {moss_train.__version__}\n"


@pytest.mark.processes
def test_program_help_and_config(tmp_path):
    done = run_program("decode", "--cfg", "job", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert yaml.safe_load(done.stdout)["format"] == "wav"


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "moss_train doctor: interrupted"),
        (FileNotFoundError(2, "No such file or directory", "/x/y"), 2, "moss_train doctor: /x/y: No such file or dir"),
        (PermissionError(13, "Permission denied", "/x"), 2, "moss_train doctor: /x: Permission denied"),
        (OSError("two\nlines"), 2, "moss_train doctor: two lines"),
        (UserError("change\n  this"), 2, "moss_train doctor: change this"),
        (
            torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8 GiB"
            ),
            1,
            "moss_train doctor: CUDA out of memory. Tried to allocate 2.00 GiB: use smaller batches",
        ),
    ],
)
def test_errors_while_a_command_runs(error_line, monkeypatch, error, status, message):
    def fail(config):
        raise error

    monkeypatch.setattr("moss_train.commands.doctor.run", fail)
    assert error_line(["doctor"], status).startswith(message)


def test_bugs_keep_their_traceback(monkeypatch):
    def fail(config):
        raise RuntimeError("a bug")

    monkeypatch.setattr("moss_train.commands.doctor.run", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["doctor"])


@pytest.mark.parametrize(("returned", "status"), [(None, 0), (0, 0), (1, 1)])
def test_the_command_decides_the_exit_status(monkeypatch, returned, status):
    monkeypatch.setattr("moss_train.commands.doctor.run", lambda config: returned)
    assert main(["doctor"]) == status


CONNECTED = """
import atexit, sys
import torch.distributed as dist
dist.init_process_group("gloo", f"file://{sys.argv[1]}", world_size=1, rank=0)
atexit.register(print, "farewell")
sys.argv = ["moss_train", *sys.argv[2:]]
from moss_train.cli.main import run_program
run_program()
"""


@pytest.mark.parametrize(("arguments", "status"), [(["pack", "sampling_rat=3"], 2), (["--version"], 0)])
def test_one_of_several_processes_that_fails_ends_without_farewell(launcher, tmp_path, arguments, status):
    (tmp_path / "connected.py").write_text(CONNECTED)
    outcome = launcher.start_script(tmp_path / "connected.py", str(tmp_path / "rendezvous"), *arguments).wait()
    assert outcome.status == status
    assert ("farewell" in outcome.log) == (status == 0)
    assert ("did you mean sampling_rate" in outcome.log) == (status == 2)
