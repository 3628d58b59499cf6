"""Run configs: what YAML, overrides and environment turn into, and the values nobody gave."""

from __future__ import annotations

from pathlib import Path

import pytest

from recyclable.cli import main
from recyclable.config.run_file import read_run_file
from recyclable.errors import InputError
from recyclable.lm.parts.kind import LMKind
from recyclable.methods.parts.method import Method
from recyclable.recipes.pretrain_settings import read_pretrain_settings
from recyclable.recipes.recycle_settings import read_recycle_settings
from recyclable.recipes.study_settings import StudySettings, read_study_settings
from recyclable.recipes.tune_settings import TuneSettings, read_tune_settings

TUNE = "base: b\ntask: t\nout: o\nmax_steps: 5\nlearning_rate: 0.001\n"


def pretrain(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> LMKind:
    return read_pretrain_settings(read_run_file(path, overrides), path)


def tune(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> TuneSettings:
    return read_tune_settings(read_run_file(path, overrides), path)


def recycle(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> Method:
    return read_recycle_settings(read_run_file(path, overrides), path)


def study(path: Path, overrides: list[str] | tuple[str, ...] = ()) -> StudySettings:
    return read_study_settings(read_run_file(path, overrides), path)


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write


def test_values_nobody_gave_are_the_documented_ones(write) -> None:
    config = tune(write(TUNE))
    assert (config.train_batch_size, config.seed, config.max_length, config.max_grad_norm) == (16, 20, 128, 1.0)
    assert (config.tuning, config.shots, config.dropout, config.metric) == ("full", None, None, None)
    assert config.out == Path("o") and config.lr_scheduler_type == "linear"


def test_about_fifty_evaluations_unless_told_otherwise(write) -> None:
    path = write(TUNE)
    assert tune(path, ["max_steps=1000"]).evaluation_interval() == 20
    assert tune(path, ["max_steps=3"]).evaluation_interval() == 1
    assert tune(path, ["eval_every=7"]).evaluation_interval() == 7


def test_a_run_that_ends_before_its_first_checkpoint_writes_none(write) -> None:
    def writes(*keys: str) -> bool:
        return tune(write(TUNE), list(keys)).writes_checkpoints

    assert writes("max_steps=500") and not writes("max_steps=499")
    assert not writes("max_steps=499", "save_every=0") and writes("save_every=0", "save_every_minutes=5")


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.e-4", "0.0001", "+1e-4", ".1e-3", "1.0e-4"])
def test_numbers_with_an_exponent_need_no_dot(write, text: str) -> None:
    path = write(TUNE.replace("0.001", text))
    assert tune(path).learning_rate == 1e-4
    assert tune(write(TUNE), [f"learning_rate={text}"]).learning_rate == 1e-4


def test_names_that_only_look_like_numbers_stay_names(write) -> None:
    assert tune(write(TUNE), ["base=e5", "task=1e4x"]).base == "e5"


def test_overrides_win_over_the_file_and_the_last_over_the_first(write) -> None:
    config = tune(write(TUNE), ["seed=1", "max_steps=9", "seed=2", "shots=null", "out=a=b"])
    assert (config.seed, config.max_steps, config.shots, config.out) == (2, 9, None, Path("a=b"))


def test_dots_reach_into_sections_and_make_them(write) -> None:
    text = "base: b\nout: o\nmax_steps: 5\nlearning_rate: 0.001\n"
    overrides = ["corpus.train=c.txt", "corpus.text_column=body"]
    config = pretrain(write(text), overrides)
    assert (config.corpus.train, config.corpus.text_column, config.corpus.heldout) == ("c.txt", "body", None)
    kept = pretrain(write(text + "corpus: {train: [a, b]}\n"), ["corpus.heldout=h.txt"])
    assert (kept.corpus.train, kept.corpus.heldout) == (["a", "b"], "h.txt")


def test_an_override_into_something_that_is_no_section_is_refused(write) -> None:
    with pytest.raises(InputError, match=r"base\.x=1: base is not a section"):
        tune(write(TUNE), ["base.x=1"])


@pytest.mark.parametrize(("corpus", "train"), [("c.txt", "c.txt"), ("[a.txt, b.txt]", ["a.txt", "b.txt"])])
def test_a_corpus_may_be_just_its_files(write, corpus: str, train: object) -> None:
    text = f"base: b\nout: o\nmax_steps: 5\nlearning_rate: 0.001\ncorpus: {corpus}\n"
    assert pretrain(write(text)).corpus.train == train


def test_environment_variables_are_expanded_wherever_they_stand(write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_DIR", "/data")
    text = "base: $SOME_DIR/b\nout: ${SOME_DIR}/o\nmax_steps: 5\nlearning_rate: 1e-3\ncorpus: [$SOME_DIR/a, c]\n"
    config = pretrain(write(text), ["seed=3"])
    assert (config.base, config.out, config.corpus.train) == ("/data/b", Path("/data/o"), ["/data/a", "c"])
    assert pretrain(write(text), ["base=${SOME_DIR}x"]).base == "/datax"


def test_configs_do_not_change(write) -> None:
    config = tune(write(TUNE))
    with pytest.raises(ValueError):
        config.seed = 3


def test_applying_needs_no_steps_and_training_does(write) -> None:
    text = "base: b\ntask: t\nout: o\nweights: w\nold_base: a\nmethod: apply\n"
    assert recycle(write(text)).method == "apply"
    with pytest.raises(InputError, match="key 'max_steps' is missing"):
        recycle(write(text), ["method=init"])
    with pytest.raises(InputError, match=r"run\.yaml: key 'learning_rate' is missing$"):
        recycle(write(text), ["method=init", "max_steps=4"])


BOMB = "[&a0 x, " + ", ".join(f"&a{i} [{f'*a{i - 1}, ' * 9}x]" for i in range(1, 30)) + "]"
"""9^29 values in a few lines."""


@pytest.mark.parametrize("value", ["2024-99-99", "!!int abc", "!!bool x", "1" * 5000, "[" * 3000, "&a [*a]", BOMB])
def test_a_value_that_yaml_cannot_make_is_one_line_that_says_where(write, value: str) -> None:
    for text, overrides, said in [
        (f"{TUNE}seed: {value}\n", [], r"run\.yaml: (broken YAML: (line 6|nested too)|seed is nested)"),
        (TUNE, [f"seed={value}"], r"^(seed: broken value: |.*run\.yaml: seed is nested too deeply)"),
    ]:
        with pytest.raises(InputError, match=said) as caught:
            tune(write(text), overrides)
        assert "\n" not in str(caught.value)


def test_a_key_that_stands_twice_in_a_mapping_is_refused_where_it_stands(write) -> None:
    for text, overrides, said in [
        (f"{TUNE}base: other\n", [], r"run\.yaml: broken YAML: line \d+, column 1: key 'base' stands in it twice"),
        (TUNE, ["task={kind: a, kind: b}"], r"^task: broken value: line 1, column 11: key 'kind' stands in it twice"),
    ]:
        with pytest.raises(InputError, match=said):
            tune(write(text), overrides)
    merged = "x: &x {a: 1, b: 2}\ny: {<<: *x, b: 3}\nz: {<<: *x}\n"
    assert read_run_file(write(merged))["y"] == {"a": 1, "b": 3}


@pytest.mark.parametrize("name", ["max_steps", "learning_rate", "shots", "seed"])
def test_a_boolean_is_no_number(write, name: str) -> None:
    with pytest.raises(InputError, match=rf"run\.yaml: {name}: found True, expected a number$"):
        tune(write(TUNE), [f"{name}=true"])
    assert tune(write(TUNE), ["group_by_length=true"]).group_by_length is True


@pytest.mark.parametrize("name", ["max_steps", "shots", "seed", "lora_alpha", "early_stopping_patience"])
@pytest.mark.parametrize("value", [2**63, 10**400])
def test_a_whole_number_has_64_bits(write, name: str, value: int) -> None:
    said = rf"{name}: found a number of {value.bit_length()} bits, expected at most 63$"
    with pytest.raises(InputError, match=said):
        tune(write(TUNE), ["tuning=lora", f"{name}={value}"])
    assert getattr(tune(write(TUNE), ["tuning=lora", f"{name}={2**63 - 1}"]), name) == 2**63 - 1


@pytest.mark.parametrize(
    ("tuning", "name", "most"),
    [
        ("full", "dataloader_num_workers", 1024),
        ("full", "dataloader_prefetch_factor", 1024),
        ("full", "train_batch_size", 1 << 24),
        ("lora", "lora_r", 1 << 16),
        ("bottleneck", "bottleneck_size", 1 << 16),
    ],
)
def test_what_is_made_in_such_a_number_has_a_bound(write, tuning: str, name: str, most: int) -> None:
    with pytest.raises(InputError, match=rf"{name}: found 1000000000, expected: less than or equal to {most}$"):
        tune(write(TUNE), [f"tuning={tuning}", f"{name}=1000000000"])
    assert getattr(tune(write(TUNE), [f"tuning={tuning}", f"{name}={most}"]), name) == most


def test_a_pattern_of_ranks_has_the_bound_of_a_rank(write) -> None:
    with pytest.raises(InputError, match=r"rank_pattern\.query: found 1000000000, expected: less than"):
        tune(write(TUNE), ["tuning=lora", "rank_pattern.query=1000000000"])


def test_several_mistakes_are_told_in_one_line(write) -> None:
    with pytest.raises(InputError) as caught:
        tune(write(TUNE), ["tuning=lora", "seeds=3", "max_steps=-1", "lora_r=x"])
    message = str(caught.value)
    assert "\n" not in message
    for part in ("unknown key 'seeds', did you mean 'seed'?", "max_steps: found -1", "lora_r: found 'x'"):
        assert part in message


def test_keys_that_nothing_reads_are_told_together(write) -> None:
    with pytest.raises(InputError, match=r"unknown keys 'alpha', 'beta'; tuning full reads [a-z_0-9, ]+$"):
        tune(write(TUNE), ["tuning=full", "alpha=1", "beta=1"])


def test_names_that_the_trainer_has_are_told_what_they_are_called_here(write) -> None:
    with pytest.raises(InputError) as caught:
        tune(write(TUNE), ["per_device_train_batch_size=4", "num_train_epochs=3", "model_name_or_path=b"])
    message = str(caught.value)
    assert "'per_device_train_batch_size', did you mean 'train_batch_size' (over all ranks" in message
    assert "'num_train_epochs', did you mean 'max_steps'?" in message and " reads " not in message
    assert "'model_name_or_path', did you mean 'base'?" in message


STUDY = """
out: o
bases: {A: {path: a}, B: {parent: A, corpus: c.txt}}
tasks: {t: tasks/t}
edges: [{old: A, new: B}]
seeds: [1, 2]
experiments: {all: {methods: {init: {}}}}
"""


def test_a_study_must_hold_together(write) -> None:
    corpus = "bases.B.corpus={train: c.txt}"
    assert study(write(STUDY), [corpus]).edges[0].tuning == ["full"]
    two = "experiments.all.methods.init.settings=[{learning_rate: 1e-4}, {learning_rate: 1e-3}]"
    for overrides, said in [
        (["edges=[{old: A, new: C}]"], "'C' is not one of bases"),
        ([two], "selection_seed: missing"),
        ([two, "selection_seed=2"], "selection_seed: 2 is also one of the reported seeds"),
        (["bases.A.parent=B"], "needs either `path`, or `parent` and `corpus`"),
    ]:
        with pytest.raises(InputError, match=said):
            study(write(STUDY), [corpus, *overrides])


def test_settings_may_stand_before_between_and_behind_options(tmp_path: Path, capsys) -> None:
    (tmp_path / "run.yaml").write_text("base: nowhere\n")
    behind = [
        "tune",
        str(tmp_path / "run.yaml"),
        "seed=1",
        "--resume",
        "max_steps=2",
        "--out",
        str(tmp_path / "o"),
        "learning_rates=3",
    ]
    assert main(behind) == 2
    said = capsys.readouterr().err
    assert "unknown key 'learning_rates'" in said and "max_steps" not in said and "seed" not in said


def test_unknown_options_and_stray_words_are_refused(tmp_path: Path) -> None:
    for argv in (
        ["tune", "run.yaml", "--nproc_per_node", "2"],
        ["evaluate", "--weights", "w", "--base", "b", "--task", "t", "x=1"],
    ):
        with pytest.raises(SystemExit) as ended:
            main(argv)
        assert ended.value.code == 2
