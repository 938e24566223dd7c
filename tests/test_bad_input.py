"""Does every mistake end in one line and exit code 2, and is the help of help?"""

import shutil
import sys
import typing

import harness
from common import UserError

import pytest
from test_oracle import Alphabetical
from test_run import SCRIPTS, Rule, own_flags, train


@pytest.fixture
def ends(flags, monkeypatch, capsys):
    """Run a script's command line with changed flags; its last line and its exit code."""

    def run(script: str, *words: str, oracle=None, **changes) -> tuple[str, int]:
        given, module = own_flags(script, flags) | changes, SCRIPTS[script]
        given = [word for n, v in given.items() if v is not None for word in (f"--{n}", str(v))]
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *given, *words])
        judge = oracle and (lambda config: module.train(config, oracle(config)))
        with pytest.raises(SystemExit) as stop:
            harness.main(module.Config, judge or module.train, module.__doc__)
        printed = capsys.readouterr().err
        assert "Traceback" not in printed
        return printed.strip("\n").split("\n")[-1], stop.value.code

    return run


@pytest.fixture
def refused(ends):
    """What a command is refused with: `error: ...` on a line of its own, and exit code 2."""

    def run(*words: str, **changes) -> str:
        line, code = ends(*words, **changes)
        assert code == 2 and line.startswith("error: ") and len(line) > 25, line
        return line.removeprefix("error: ")

    return run


MAY_BE_0 = {"seed", "learning_rate", "warmup_steps", "num_heads", "burn_in", "anchor", "best_of_n"}
MAY_BE_0 |= {"alpha", "ranker_candidates"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_number_out_of_range_is_refused_by_name_and_0_where_it_has_no_meaning(script, refused):
    hints = typing.get_type_hints(SCRIPTS[script].Config)
    numbers = {n for n, hint in hints.items() if {int, float} & {hint, *typing.get_args(hint)}}
    numbers.remove("planned_queries")  # no flag
    cases = [(name, "-1") for name in numbers] + [(name, "0") for name in numbers - MAY_BE_0]
    cases += [(n, v) for n in ("beta", "learning_rate") for v in ("nan", "inf", "-inf")]
    for name, value in cases:
        assert refused(script, f"--{name}={value}", **{name: None}).startswith(f"--{name} ")
    for name in ("seed", "learning_rate", "warmup_steps"):
        assert getattr(SCRIPTS[script].Config(**{name: 0}), name) == 0
    assert len(cases) > 30


@pytest.mark.parametrize("command, said", [
    ("pilaf --labels often", "--labels"), ("sea --seed 0.5", "--seed"),
    ("pilaf --bet 1", "--bet"), ("selm stray", "stray"),
    ("sea --device abacus", "--device abacus: "), ("pilaf --device cud", "--device cud: "),
    ("pilaf --resume", "holds no run"),
    ("selm --resume --overwrite", "--resume excludes --overwrite"),
    ("selm --resume elsewhere", "--resume names another folder than --output_dir"),
    ("pilaf --sampler best_of_n_oracle --num_candidates 13", "a prompt takes 13 labels"),
    ("pilaf --num_iterations 9 --num_queries 8", "--num_queries 8 pays for no prompt"),
    ("pilaf --dataset README.md", "README.md: not a json, jsonl, csv or parquet file"),
    ("sea --temperature 1e-4", "20 rounds"),  # in mid-run, not garbled by the progress bar
])  # fmt: skip
def test_a_command_that_cannot_be_meant_or_collapses_says_so_in_a_line(command, said, refused):
    assert said in refused(*command.split())


@pytest.mark.parametrize("command", [
    "sea --gamma 1.5", "sea --explore passive --gamma .7", "sea --explore apl --gamma .7",
    "sea --num_candidates 1", "sea --explore apl --num_candidates 1", "sea --num_heads 1",
    "sea --explore passive --num_candidates 3", "sea --explore passive --num_heads 2",
    "sea --explore apl --best_of_n 2 --num_heads 0", "sea --num_heads 0",
    "sea --explore apl --loss ipo", "selm --bonus none --alpha 1e-3",
    "selm --bonus xpo --ranker_candidates 0", "selm --bonus xpo --ranker_candidates 2",
    "selm --learning_rate_factors 1 .5", "selm --learning_rate_factors 1 nan 1",
    "selm --num_iterations 4 --learning_rate_factors 1 .6 .2",
    "selm --learning_rate_factors -1 1 1",  # goes up the loss
    "pilaf --beta 1.5", "pilaf --sampler_beta 2", "pilaf --sampler vanilla --sampler_beta .2",
    "pilaf --sampler best_of_n --num_candidates 1", "pilaf --num_candidates 3",
    "pilaf --sampler vanilla --num_candidates 8", "pilaf --num_epochs 2",
    "pilaf --sampler hybrid --importance_weights",
    "pilaf --importance_weights --temperature .7",
    "pilaf --importance_weights --sampler_beta .2",
    "pilaf --num_iterations 2 --num_queries 16 --num_epochs 2 --warmup_steps 4",
])  # fmt: skip
def test_flags_that_contradict_each_other_are_refused_by_the_name_of_the_last(command, refused):
    last = [word for word in command.split() if word.startswith("--")][-1]
    assert last in refused(*command.split())


@pytest.mark.parametrize("script, name", [*zip(SCRIPTS, ("labels", "bonus", "sampler"))])
def test_a_choice_that_a_notebook_makes_is_checked_as_a_command_lines_is(script, name):
    """A misspelt rule of labels was taken for argmax."""
    with pytest.raises(UserError, match=f"--{name} bernouli is none of .*, "):
        SCRIPTS[script].Config(**{name: "bernouli"})


def test_a_flag_given_again_at_its_default_is_not_overlooked(refused, flags):
    train("pilaf", flags, beta=0.5)
    words, nothing = f"pilaf --resume {flags['output_dir']} --num_queries 16", dict.fromkeys(flags)
    assert "--beta 0.5, not 0.1" in refused(*words.split(), "--beta=0.1", **nothing)
    assert "--batch_size 4, not 16" in refused(*words.split(), "--batch-size", "16", **nothing)


def test_a_run_of_another_script_is_not_resumed(refused, tmp_path):
    """Nor one of notebooks/my_rule.py, whose flags are sea.py's."""
    (tmp_path / "config.json").write_text('{"script": "my_rule", "flags": {"explore": "bai"}}')
    assert "holds no run of sea.py" in refused("sea", output_dir=None, resume=str(tmp_path))


@pytest.mark.parametrize("name", ["model", "ref_model", "reward_model", "erm_backbone"])
def test_a_path_is_named_with_its_flag_if_nothing_is_there_or_a_library_fails(
    name, refused, flags, folder
):
    """A library names the path, of which another flag's value is a part, as ./tiny is of all."""
    assert refused("sea", **{name: "./nowhere"}).startswith(f"--{name} ./nowhere: ")
    damaged = folder / f"damaged_{name}"
    shutil.copytree(own_flags("sea", flags).get(name, flags["model"]), damaged)
    (damaged / "config.json").write_text("{")
    assert refused("sea", **{name: damaged}).startswith(f"--{name} {damaged}: ")


@pytest.mark.parametrize("text", ["", "not json\n", "[1, 2\n", '{"prompt": 1}\n{"prompt": "b"}\n'])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_damaged_data_set_is_refused(text, suffix, refused, tmp_path):
    (data := tmp_path / f"data.{suffix}").write_text(text)
    assert refused("pilaf", dataset=data).startswith(f"--dataset {data}: ")


def test_an_oracle_that_cannot_do_what_it_is_asked_for_says_so(ends, monkeypatch):
    assert ends("pilaf", oracle=harness.Oracle) == ("error: an oracle needs `score` or `prefer`", 2)
    assert "this oracle has no `score`" in ends("selm", "--overwrite", oracle=Alphabetical)[0]
    assert "best_of_n needs" in ends("sea", "--best_of_n=2", "--overwrite", oracle=Alphabetical)[0]
    full = type("Full", (Rule,), {"stop_at": 0, "error": MemoryError("CPU is full")})
    assert "--device cpu: CPU is full" in ends("sea", "--overwrite", oracle=full, device="cpu")[0]
    monkeypatch.setattr(harness.common, "ranks", lambda: (0, 2))
    assert "Rule is asked by each process" in ends("sea", "--overwrite", oracle=Rule)[0]


@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_ends_with_130_and_a_line_on_how_to_go_on(script, ends, flags):
    def interrupt(*_) -> None:
        raise KeyboardInterrupt

    halting = type("Halting", (Rule,), {"stop_at": 5, "error": KeyboardInterrupt})
    early = type("Early", (Rule,), {"__init__": interrupt})
    assert ends(script, oracle=early) == ("stopped", 130)  # there is nothing to go on with
    line, code = ends(script, oracle=halting)
    assert code == 130 and f"--resume {flags['output_dir']}" in line


def test_debug_shows_where_a_mistake_was_found(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pilaf.py", "--model", "./nowhere", "--debug"])
    with pytest.raises(Exception, match="nowhere"):
        harness.main(SCRIPTS["pilaf"].Config, SCRIPTS["pilaf"].train, "title")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_explains_each_flag_and_shows_no_default_of_none(script, capsys, monkeypatch):
    module = SCRIPTS[script]
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        harness.main(module.Config, module.train, module.__doc__)
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "None" not in text and text.count("(default: ") > 20
    assert "reference of the loss" not in text  # SELM's is another
    known = [field for field in module.Config.__dataclass_fields__.values() if field.init]
    assert all(f"--{field.name} " in text and field.metadata["help"] for field in known)
