"""The edge of the commands: flags and config files, exit statuses, and one line for a user's mistake."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from elm_jax import cli, schema
from elm_jax.cli import ConfigFlags
from elm_jax.config import SCHEMA, Config
from elm_jax.errors import UserError
from elm_jax.registry import Registry

ROOT = Path(__file__).resolve().parents[2]


def command(argv: list[str], main=None) -> tuple[int, Config | None]:
    """Exit status of a command run on `argv`, and the Config that its main got, if any."""
    got: list[Config] = []
    with pytest.raises(SystemExit) as exit_:
        cli.run(main or got.append, argv)
    return int(exit_.value.code or 0), got[0] if got else None


def accepted(*flags: str) -> Config:
    status, config = command(["--config", "configs/base.py", *flags])
    assert status == 0 and config is not None
    return config


@pytest.fixture
def config_file(tmp_path: Path):
    """config_file(body): the path of a config file `mine.py` with that text."""

    def write(body: str) -> str:
        path = tmp_path / "mine.py"
        path.write_text(textwrap.dedent(body))
        return str(path)

    return write


def error_line(capsys: pytest.CaptureFixture[str], *argv: str, main=None) -> str:
    """The one line on stderr of a command that must exit with status 2 and print nothing else."""
    status, _ = command(list(argv), main)
    out, err = capsys.readouterr()
    assert status == 2
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert err.startswith("error: ")
    assert "found" in err and "expected" in err
    return err.strip()


def test_flags_of_all_forms_reach_the_config() -> None:
    config = accepted(
        "--config.update=connector,llm", "--config.optim.lr", "1e-3", "--noconfig.data.pack",
        "--config.train.early_stopping", "--config.data.names=a,b",
        '--config.llm.scratch={"layers": 2}', "--config.llm.scratch.width=8", "--config.mesh.data", "-1",
        "--config.encoder.config.kind=small", "-config.seed=3", "--config.data.leads=0,V1",
    )  # fmt: skip
    assert config.update == ("connector", "llm")
    assert config.optim.lr == 1e-3
    assert config.data.pack is False
    assert config.train.early_stopping is True
    assert config.data.names == ("a", "b")
    assert config.llm.scratch == {"layers": 2, "width": 8}
    assert config.encoder.config == {"kind": "small"}
    assert config.mesh.data == -1 and config.seed == 3
    assert config.data.leads == ("I", "V1")


@pytest.mark.parametrize("key", [name for name, known in SCHEMA.items() if tuple in schema.kinds(known.type)])
def test_of_two_flags_with_lists_the_last_counts(key: str) -> None:
    """They do not add up: who takes up a command and appends a flag means that one."""
    flags = ConfigFlags.parse([f"--config.{key}=1,2", f"--config.{key}=3"])
    assert flags.values == ConfigFlags.parse([f"--config.{key}=3"]).values


def test_of_a_dictionary_and_an_entry_of_it_the_last_counts() -> None:
    whole, entry = '--config.llm.scratch={"layers": 2}', "--config.llm.scratch.width=8"
    assert accepted(whole, entry).llm.scratch == {"layers": 2, "width": 8}
    assert accepted(whole, entry, whole).llm.scratch == {"layers": 2}


def test_the_last_of_two_flags_counts_and_flags_go_over_the_file(config_file) -> None:
    path = config_file("def get_config():\n    return {'train': {'steps': 7, 'epochs': 2}, 'seed': 5}")
    status, config = command(
        [f"--config={path}", "--config.seed=1", "--config.seed=2", "--config.train.steps=None"]
    )
    assert status == 0 and config is not None
    assert (config.seed, config.train.epochs, config.train.steps) == (2, 2, None)


def test_an_entry_of_a_dictionary_of_the_file_can_be_changed_alone(config_file) -> None:
    path = config_file("def get_config():\n    return {'llm': {'scratch': {'layers': 2, 'width': 8}}}")
    _, config = command(["--config", path, "--config.llm.scratch.layers=4"])
    assert config is not None and config.llm.scratch == {"layers": 4, "width": 8}


def test_the_run_is_named_after_the_file_and_its_argument(config_file) -> None:
    path = config_file("def get_config(size='small'):\n    return {'workdir': f'runs/<name>/{size}'}")
    assert [command([f"--config={path}{arg}"])[1].workdir for arg in ("", ":big")] == [  # type: ignore[union-attr]
        "runs/mine/small",
        "runs/mine_big/big",
    ]


def test_a_packaged_config_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for named in ("configs/base.py", "base.py"):
        status, config = command(["--config", named])
        assert status == 0 and config is not None and config.workdir == "runs/base"
    for named in ("configs/st_mem_full_training/stage1.py", "st_mem_full_training/stage1.py"):
        status, config = command(["--config", named])
        assert status == 0 and config is not None and config.workdir == "runs/st_mem_full_training/stage1"


def test_every_packaged_config_is_listed_and_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    line = error_line(capsys, "--config=/0")
    for file in (ROOT / "elm_jax" / "configs").rglob("[!_]*.py"):
        named = file.relative_to(ROOT / "elm_jax").as_posix()
        assert named in line
        cli.read_config_file(named)
    assert "did you mean 'configs/st_mem_full_training/stage1.py'?" in error_line(
        capsys, "--config=configs/st_mem_full_training/stage11.py"
    )


def test_a_file_of_the_users_comes_before_the_packaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.py").write_text("def get_config():\n    return {'seed': 11}")
    _, config = command(["--config", "base.py"])
    assert config is not None and config.seed == 11


BASE = "--config=configs/base.py"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], ["--config", "no config file"]),
        (["--config"], ["--config", "no value"]),
        (["--config", "--config.seed=1"], ["--config", "no value"]),
        (["--config=configs/bse.py"], ["configs/bse.py", "did you mean 'configs/base.py'?"]),
        (["--config=elsewhere/base.py"], ["no file elsewhere/base.py"]),
        (["--config=configs"], ["no file configs"]),
        (["--confg=configs/base.py"], ["--confg", "did you mean --config?"]),
        ([BASE, "--config.data.name=demo"], ["config.data.name", "did you mean '--config.data.names'?"]),
        ([BASE, "--config.data.lr=3"], ["config.data.lr", "did you mean '--config.optim.lr'?"]),
        ([BASE, "--config.optim.lrr=3"], ["config.optim.lrr", "did you mean '--config.optim.lr'?"]),
        ([BASE, "--config.lr=3"], ["config.lr", "--config.optim.lr"]),
        ([BASE, "--config.optim=3"], ["config.optim", "section"]),
        ([BASE, "--config.seed.x=3"], ["config.seed.x"]),
        ([BASE, "--config.optim.lr=abc"], ["optim.lr", "'abc'", "a number"]),
        ([BASE, "--config.seed=1.5"], ["seed", "'1.5'", "a whole number"]),
        ([BASE, "--config.data.pack=maybe"], ["data.pack", "'maybe'", "true or false"]),
        ([BASE, "--config.optim.lr"], ["--config.optim.lr", "no value"]),
        ([BASE, "--noconfig.seed"], ["--noconfig.seed", "--config.seed=VALUE"]),
        ([BASE, "--config.update=conector"], ["update", "did you mean 'connector'?"]),
        ([BASE, "--config.phase=sft", "--config.objective=pretrain"], ["config.phase", "older name of objective"]),
        ([BASE, "--config.compat=elm-2026-4"], ["compat", "did you mean 'elm-2026-04'?"]),
        ([BASE, "lr=3"], ["'lr=3'", "did you mean --config.optim.lr=3?"]),
        ([BASE, "--lr=3"], ["'--lr=3'", "did you mean --config.optim.lr=3?"]),
        ([BASE, "--", "--config.seed=1"], ["'--'"]),
        ([BASE, "--verbosity=1"], ["--verbosity"]),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_status_2(
    argv: list[str], said: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = error_line(capsys, *argv)
    assert all(text in line for text in said), line


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("x = 1", ["mine.py", "no function get_config"]),
        ("def get_config(:", ["mine.py line 1", "SyntaxError"]),
        ("\n\nimport no_such_module", ["mine.py line 3", "no_such_module"]),
        ("def get_config():\n    return 3", ["mine.py", "returning int"]),
        ("def get_config(size):\n    return {}", ["mine.py", "TypeError", "size"]),
        ("def get_config():\n    return {'optim': {'lrr': 1}}", ["optim.lrr", "did you mean 'optim.lr'?"]),
        (
            "from elm_jax.config import default_config\n"
            "def get_config():\n    c = default_config()\n    c.optim.lr = 'abc'\n    return c",
            ["mine.py line 4", "TypeError", "lr"],
        ),
        (
            "from elm_jax.config import default_config\n"
            "def get_config():\n    c = default_config()\n    c.optm.lr = 1\n    return c",
            ["mine.py line 4", "optm"],
        ),
    ],
)
def test_a_mistake_in_a_config_file_is_one_line_and_status_2(
    body: str, said: list[str], config_file, capsys: pytest.CaptureFixture[str]
) -> None:
    line = error_line(capsys, "--config", config_file(body))
    assert all(text in line for text in said), line


def failing(config: Config) -> None:
    raise UserError("data.csv", "3 columns", "4", "add\nthe missing one")


def test_a_user_error_of_the_command_itself_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    line = error_line(capsys, BASE, main=failing)
    assert line == "error: data.csv: found 3 columns; expected 4; add the missing one"


@pytest.mark.parametrize("flag", ["--debug", "--config.debug", "--config.debug=true"])
def test_debug_shows_the_traceback_once_before_the_line(
    flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command([BASE, flag], failing)[0] == 2
    err = capsys.readouterr().err
    assert err.count("Traceback") == 1
    assert err.splitlines()[-1].startswith("error: data.csv")


def test_a_config_file_may_set_debug(config_file, capsys: pytest.CaptureFixture[str]) -> None:
    path = config_file("def get_config():\n    return {'debug': True}")
    assert command(["--config", path], failing)[0] == 2
    assert "Traceback" in capsys.readouterr().err


def test_debug_works_for_errors_of_the_flags_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["--debug", BASE, "--config.optim.lrr=1"])[0] == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_status_passes_and_a_fault_of_ours_stays_an_exception() -> None:
    def stopped(config: Config) -> None:
        raise SystemExit(143)

    def broken(config: Config) -> None:
        raise ValueError("ours")

    assert command([BASE], stopped)[0] == 143
    assert command([BASE], lambda config: 3)[0] == 3
    with pytest.raises(ValueError, match="ours"):
        cli.run(broken, [BASE])


def test_guard_serves_commands_with_flags_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv) -> None:
        parser = cli.Parser("export")
        parser.add_argument("--checkpoint", required=True)
        parser.add_argument("--step", type=int)
        raise UserError(parser.parse_args(argv).checkpoint, "nothing", "a run", "train first")

    for argv, said in [
        (["--checkpoint", "W"], "error: W: found nothing"),
        ([], "--checkpoint"),
        (["--checkpoint", "W", "--step", "x"], "--step"),
        (["--checkpoint", "W", "--stpe=3"], "did you mean '--step'?"),
        (["--check", "W"], "--checkpoint"),
    ]:
        assert cli.guard(main, argv) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and len(err.splitlines()) == 1 and said in err, err
    assert cli.guard(main, ["--checkpoint", "W", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_config_flags_leave_a_commands_own_flags_alone() -> None:
    flags = cli.ConfigFlags.parse(["--topology", "cpu:8", BASE, "--config.seed=4", "--json", "out.json"])
    assert flags.rest == ["--topology", "cpu:8", "--json", "out.json"]
    assert flags.load().seed == 4


def test_help_tells_of_the_command_and_every_key_without_importing_jax(tmp_path: Path) -> None:
    script = tmp_path / "show.py"
    script.write_text(
        '"""Shows a config.\n\nAnd says more."""\n'
        "import sys\n"
        "from elm_jax import cli\n"
        "from elm_jax.config import Config\n"
        "def main(config: Config) -> None:\n    print(config.seed)\n"
        "try:\n    cli.run(main)\nfinally:\n    assert 'jax' not in sys.modules\n"
    )
    python = [sys.executable, str(script)]
    env = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run([*python, "--help"], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0 and done.stderr == ""
    for text in (
        "Shows a config.",
        "And says more.",
        "usage:",
        "--config.optim.lr=0.0001",
        "configs/base.py",
    ):
        assert text in done.stdout
    done = subprocess.run([*python, BASE], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")
    done = subprocess.run([*python, "--config"], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stdout == ""


# ---- files of the user's that add to the package


def test_a_registered_file_is_imported_once_as_it_is_called_and_may_import_what_lies_beside(tmp_path: Path) -> None:
    (tmp_path / "beside_mine.py").write_text("NUMBER = 7\n")
    (tmp_path / "mine_to_register.py").write_text("import beside_mine\nBESIDE = beside_mine.NUMBER\n")
    got: list[list[str]] = []
    assert cli.guard(got.append, ["a", "--register", str(tmp_path / "mine_to_register.py"), "b"]) == 0
    assert cli.guard(got.append, [f"--register={tmp_path}/mine_to_register.py"]) == 0
    assert got == [["a", "b"], []] and sys.modules["mine_to_register"].BESIDE == 7


def test_a_config_file_imports_what_lies_beside_it(config_file, tmp_path: Path) -> None:
    (tmp_path / "beside_a_config.py").write_text("SEED = 11\n")
    path = config_file("import beside_a_config\ndef get_config(): return {'seed': beside_a_config.SEED}")
    status, config = command(["--config", path])
    assert status == 0 and config is not None and config.seed == 11


@pytest.mark.parametrize(
    "body, says",
    [
        (None, "--register: found no file"),
        ("x = 1\nraise ValueError('oh')", "json.py line 2: found ValueError: oh"),
        ("x = (", "line 1: found SyntaxError"),
        ("", "json.py, called as"),
    ],
)
def test_a_file_that_cannot_be_registered_is_named(tmp_path: Path, capsys, body: str | None, says: str) -> None:
    name = "json" if body == "" else f"unregistered_{abs(hash(says))}_json"  # the first is Python's own
    if body is not None:
        (tmp_path / f"{name}.py").write_text(body)
    assert cli.guard(lambda _: 0, ["--register", str(tmp_path / f"{name}.py")]) == 2
    assert says in capsys.readouterr().err


def test_names_of_the_package_are_not_taken_and_own_ones_may_be_given_again() -> None:
    rows = Registry("encoder.name", {"merl": 1})
    rows.register("mine", 2)
    rows.register("mine", 3)
    assert rows.find("mine") == 3
    for name, says in (("merl", "a name of the package"), ("a b", "no name")):
        with pytest.raises(UserError, match=says):
            rows.register(name, 4)
    with pytest.raises(UserError, match="did you mean 'mine'.*--register FILE"):
        rows.find("minee")
