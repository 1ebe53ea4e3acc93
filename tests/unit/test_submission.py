"""`raysal submit`: one id for one piece of work, nothing secret and nothing of this machine in a job, refusals before anything is sent."""

from __future__ import annotations

import json
import shlex
import zipfile
from pathlib import Path

import pytest

import raysal
from raysal.environment import CLIENT, JOB_CPUS, JOB_MEMORY, programs
from raysal.errors import InputError
from raysal.jobs.submission import VERBS, check_address, in_clear
from tests.helpers import Call
from tests.unit.submitted import ADDRESS, LABEL, config, made, no_token  # noqa: F401 - a fixture for every test

ROOT = Path(__file__).resolve().parents[2]


# --- ids --------------------------------------------------------------------------------------------------------------


def test_the_same_work_has_one_id_however_it_is_written(tmp_path: Path) -> None:
    first = made("label", *LABEL)
    assert first.id.startswith("raysal-label-") and len(first.id) == len("raysal-label-") + 12
    assert made("label", "--out=s3://m/labels", "s3://m/model", "s3://m/manifest").id == first.id
    assert made("label", *LABEL, "--json").id == first.id
    assert made("label", *LABEL, "--config", config(tmp_path, "{}")).id == first.id
    one, other = config(tmp_path / "a", "train: {steps: 7}"), config(tmp_path / "b", "# seven\ntrain:\n  steps: 7\n", "other.yaml")
    ids = {made("label", *LABEL, *how).id for how in (("--config", one), ("--config", other), ("--set", "train.steps=7"))}
    assert len(ids) == 1 and ids != {first.id}


@pytest.mark.parametrize("change", ["compute.score_actors=3", "compute.use_gpu=true"])
def test_where_it_runs_does_not_make_it_another_work(change: str) -> None:
    """A job that failed for want of memory is the same work with fewer actors."""
    assert made("label", *LABEL, "--set", change).id == made("label", *LABEL).id
    assert made("label", *LABEL, cpus=4.0, memory=10**9).id == made("label", *LABEL).id


@pytest.mark.parametrize(
    "arguments",
    [
        ("s3://m/model2", *LABEL[1:]),
        (*LABEL[:3], "s3://m/labels2"),
        (*LABEL, "--precision", "0.9"),
        (*LABEL, "--replace"),
        (*LABEL, "--set", "seed=1"),
        (*LABEL, "--set", "run=s3://m/run"),
    ],
)
def test_other_work_has_another_id(arguments: tuple[str, ...]) -> None:
    assert made("label", *arguments).id != made("label", *LABEL).id
    assert made("score", *LABEL).id != made("label", *LABEL).id


# --- what is sent -----------------------------------------------------------------------------------------------------


def test_the_command_line_is_quoted_for_the_clusters_shell(tmp_path: Path) -> None:
    file = config(tmp_path, "seed: 3", "my run.yaml")
    arguments = ("s3://m/a b; rm -rf $HOME", "s3://m/`x`", "--out", "s3://m/'q'", "--config", file, "--set", "name=$(id)")
    words = shlex.split(made("label", *arguments).entrypoint)
    assert words == ["python", "-m", "raysal", "label", *arguments[:5], "my run.yaml", *arguments[6:]]
    assert "--config='my run.yaml'" in made("label", *arguments[:4], f"--config={file}").entrypoint.replace("'--config=my", "--config='my")


def test_nothing_of_this_machine_travels_but_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAYSAL_TOKENS", "AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "a-secret-of-this-machine")
    (tmp_path / "beside.txt").write_text("a-secret-of-this-machine")
    job = made("label", *LABEL, "--config", config(tmp_path, "seed: 3"))
    with job.runtime_env() as sent:
        folder = Path(sent["working_dir"])
        assert {f.name: f.read_text() for f in folder.iterdir()} == {"c.yaml": "seed: 3"}
        assert set(sent) == {"env_vars", "working_dir"} and sent["env_vars"] == {JOB_CPUS: "1", JOB_MEMORY: "0", CLIENT: programs()}
    assert not folder.exists()
    assert "secret" not in json.dumps([sent, job.metadata, job.entrypoint])
    with made("label", *LABEL).runtime_env() as sent:
        assert set(sent) == {"env_vars"}


def wheel(file: Path, name: str = "raysal/__init__.py", version: str = raysal.__version__) -> Path:
    with zipfile.ZipFile(file, "w") as packed:
        packed.writestr(name, f'__version__ = "{version}"')
        packed.writestr("raysal-9.dist-info/METADATA", "Requires-Dist: torch")
        packed.writestr("../outside.py", "")
    return file


def test_a_wheel_goes_along_without_what_it_depends_on(tmp_path: Path) -> None:
    job = made("label", *LABEL, wheel=wheel(tmp_path / "raysal-9-py3-none-any.whl"))
    assert job.id == made("label", *LABEL).id
    with job.runtime_env() as sent:
        [package] = sent["py_modules"]
        assert Path(package).name == "raysal" and [f.name for f in Path(package).iterdir()] == ["__init__.py"]
        assert {f.name for f in Path(package).parent.iterdir()} == {"raysal", "config"} and not list(Path(sent["working_dir"]).iterdir())


def test_what_is_no_wheel_of_raysal_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.whl").write_text("no zip")
    damaged = tmp_path / "damaged.whl"
    with zipfile.ZipFile(damaged, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("raysal/__init__.py", "x = 1\n" * 500)
    content = damaged.read_bytes()
    begins = 30 + len("raysal/__init__.py")
    damaged.write_bytes(content[:begins] + b"\xff" + content[begins + 1 :])  # inside what is packed
    for file, said in [
        (tmp_path / "none.whl", "no wheel"),
        (tmp_path / "text.whl", "can't be read"),
        (damaged, "can't be read"),
        (wheel(tmp_path / "other.whl", "other/__init__.py"), "holds no raysal"),
        (wheel(tmp_path / "newer.whl", version="99.0"), "raysal 99.0, but this command, .* install the wheel here too"),
    ]:
        with pytest.raises(InputError, match=said):
            made("label", *LABEL, wheel=file)
    monkeypatch.setattr("raysal.jobs.submission.LARGEST_WHEEL", 10)
    with pytest.raises(InputError, match="put it into the nodes' image"):
        made("label", *LABEL, wheel=wheel(tmp_path / "large.whl"))


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_an_entry_point_for_ray_job_submit(verb: str) -> None:
    lines = (ROOT / "jobs" / f"{verb}.py").read_text(encoding="utf-8").splitlines()
    assert lines[-1] == f'main("{verb}")' and len(lines) < 12
    command = " ".join(line.rstrip("\\") for line in lines[2:4])
    made(verb, *shlex.split(command.partition(f"jobs/{verb}.py")[2]))  # the example in it is one that is taken
    assert {file.stem for file in (ROOT / "jobs").glob("*.py")} == set(VERBS)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argument",
    [
        "s3://AKIDEXAMPLE:wJalrXUt@m/model",
        "https://m/model?X-Amz-Signature=abc",
        "https://m/model?sv=1&sig=abc",
        "s3://m/AKIAIOSFODNN7EXAMPLE",
    ],
)
def test_a_credential_among_the_arguments_is_refused_and_not_repeated(argument: str) -> None:
    with pytest.raises(InputError, match="looks like a credential") as refused:
        made("label", argument, *LABEL[1:])
    assert argument not in str(refused.value)
    with pytest.raises(InputError, match="looks like a credential"):
        made("label", *LABEL, "--set", f"data.root={argument}")


def test_a_credential_in_the_config_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="looks like a credential"):
        made("label", *LABEL, "--config", config(tmp_path, "# aws_secret_access_key: wJalrXUtnFEMI\nseed: 1"))


@pytest.mark.parametrize("place", ["abfs://container@account.dfs.core.windows.net/a", "s3://m/a?versionId=3", "s3://m/a@b:c/d"])
def test_places_that_only_look_odd_pass(place: str) -> None:
    made("label", place, *LABEL[1:])


@pytest.mark.parametrize(
    ("verb", "arguments", "place"),
    [
        ("label", ("model", *LABEL[1:]), "model"),
        ("label", (*LABEL[:3], "runs/labels"), "runs/labels"),
        ("index", ("~/archive", "--out", "s3://m/manifest"), "~/archive"),
        ("evaluate", ("s3://m/model", "data"), "data"),
        ("query", ("s3://m/scores", "--budget", "3", "--out", "queue.parquet"), "queue.parquet"),
        ("train", ("--config", "CONFIG"), "runs/raysal"),
        ("loop", ("--config", "CONFIG", "--set", "run=/m/run", "--set", "data.reader=folder", "--set", "data.root=mars"), "mars"),
        ("train", ("--config", "CONFIG", "--set", "run=/m/run", "--labels", "names.txt"), "names.txt"),
    ],
)
def test_a_relative_place_is_refused_as_a_job_has_another_folder(tmp_path: Path, verb: str, arguments: tuple[str, ...], place: str) -> None:
    file = config(tmp_path, "seed: 1")
    with pytest.raises(InputError, match=f"^{place}: a relative path") as refused:
        made(verb, *(file if a == "CONFIG" else a for a in arguments))
    assert refused.value.exit_code == 2


def test_places_that_are_on_this_machine_are_kept_for_when_the_cluster_misses_them(tmp_path: Path) -> None:
    assert made("label", str(tmp_path), "/no/such/manifest", *LABEL[2:]).here == (str(tmp_path),)


def test_another_cluster_in_the_config_is_refused() -> None:
    with pytest.raises(InputError, match=r"compute\.address"):
        made("label", *LABEL, "--set", "compute.address=10.0.0.1:6379")


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:8265", "expected the dashboard's"),
        ("ray://head:10001", "expected the dashboard's"),
        ("http://", "expected the dashboard's"),
        ("http://me:hunter2@head:8265", "leave them out"),
        ("https://token@head", "leave them out"),
    ],
)
def test_an_address_that_is_none_or_holds_a_password_is_refused(address: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as refused:
        check_address(address)
    assert "hunter2" not in str(refused.value)


def test_a_token_in_clear_is_noticed() -> None:
    assert [in_clear(a) for a in ("http://head:8265", "http://10.0.0.1:1", "https://head", "http://127.0.0.1:1", "http://localhost:1")] == [
        True, True, False, False, False,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("label", *LABEL, "--nonsense"), "No such option"),
        (("label", LABEL[0]), "Missing"),
        (("label", *LABEL, "--cpus", "0"), "--cpus"),
        (("label", *LABEL, "--memory", "much"), "no size"),
        (("label", *LABEL, "--set", "train.stepz=3"), "did you mean 'train.steps'"),
        (("label", *LABEL, "--address", "http://me:pw@head"), "leave them out"),
        (("status", "raysal-label-0", "--address", ADDRESS), "no answer"),
        (("label", *LABEL, "--address", ADDRESS), "no answer"),
    ],
)
def test_bad_usage_and_an_unreachable_cluster_are_one_line(raysal: Call, arguments: tuple[str, ...], said: str) -> None:
    code, out, err = raysal("submit", *arguments)
    assert code == 2 and said in err and out == "" and "Traceback" not in err


def test_a_token_file_that_is_not_there_is_one_line_too(raysal: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ray would end the process."""
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    code, _, err = raysal("submit", "list", "--address", ADDRESS)
    assert code == 2 and "RAY_AUTH_TOKEN_PATH" in err


def test_a_verb_whose_network_runs_in_the_jobs_own_process_books_a_gpu() -> None:
    gpu = ("--set", "compute.use_gpu=true")
    assert made("evaluate", "s3://m/model", "s3://m/labelled", *gpu).gpus == 1
    assert made("evaluate", "s3://m/model", "s3://m/labelled").gpus == made("label", *LABEL, *gpu).gpus == 0
