"""A setting that nothing reads is refused by name: methods, kinds of tuning and pre-training have their own only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from worlds import write_config

from recyclable.cli import main
from recyclable.config.run_file import read_run_file
from recyclable.config.settings import Settings
from recyclable.errors import InputError
from recyclable.lm.masked import Masked
from recyclable.methods import METHODS
from recyclable.recipes.pretrain_settings import read_pretrain_settings
from recyclable.recipes.recycle_settings import read_recycle_settings
from recyclable.recipes.tune_settings import read_tune_settings, tune_settings
from recyclable.tunings import TUNINGS

Content = dict[str, Any]

# A value of each setting that is not its default; a setting that is not here is given its default.
VALUES: Content = {
    "out": "result",
    "seed": 3,
    "max_length": 24,
    "eval_batch_size": 7,
    "base": "new",
    "task": "tasks/t",
    "shots": 4,
    "max_dev_examples": 5,
    "max_test_examples": 6,
    "metric": "f1_macro",
    "weights": "tuned",
    "store": "s",
    "old_base": "old",
    "allow_unrelated": True,
    "max_steps": 9,
    "train_batch_size": 8,
    "learning_rate": 0.002,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "weight_decay": 0.1,
    "adam_beta1": 0.8,
    "adam_beta2": 0.98,
    "adam_epsilon": 1e-6,
    "max_grad_norm": 0.5,
    "dropout": 0.2,
    "attn_implementation": "eager",
    "gradient_checkpointing": True,
    "torch_compile": True,
    "eval_every": 3,
    "save_every": 4,
    "log_every": 5,
    "group_by_length": True,
    "related_task": True,
    "alpha": 0.4,
    "beta": 2.0,
    "temperature": 3.0,
    "kd_reduction": "paper",
    "teacher": "online",
    "teacher_cache": "answers",
    "teacher_top_k": 2,
    "start": "fresh",
    "task_share": 0.6,
    "interpolation_points": [0.2, 0.9],
    "interpolation_draws": 2,
    "interpolation_margin": 0.1,
    "alpha_by_point": [0.1, 0.2, 0.3, 0.4],
    "beta_by_point": [1.0, 2.0, 3.0, 4.0],
    "second_weights": "w2",
    "second_base": "b2",
    "scale": 0.5,
    "ties": 0.3,
    "dare": 0.7,
    "skip_embeddings": True,
    "align": "permutation",
    "strength_examples": 11,
    "project_from": [["w-old", "w-new"]],
    "project_rank": 4,
    "project_with": "network",
    "lora_r": 2,
    "lora_alpha": 3,
    "lora_dropout": 0.1,
    "bottleneck_size": 5,
    "target_modules": ["query"],
}
# What has to stand beside a setting for it to be read.
BESIDE: dict[str, Content] = {
    "interpolation_margin": {"interpolation_draws": 2},
    "second_weights": {"second_base": "b2"},
    "second_base": {"second_weights": "w2"},
    "align": {"allow_unrelated": True},
    "strength_examples": {"scale": "auto"},
}
PRETRAINING = {"out": "result", "base": "b", "corpus": "c.txt", "max_steps": 9, "learning_rate": 0.002}


def fields(of: type[Settings]) -> Mapping[str, Any]:
    return of.model_fields


def minimal(of: type[Settings]) -> Content:
    """A run config with what must be given and nothing else."""
    return {name: value(name, of) for name, field in fields(of).items() if field.is_required()}


def value(name: str, of: type[Settings]) -> Any:
    return VALUES[name] if name in VALUES else fields(of)[name].default


def table(kinds: Mapping[str, type[Settings]]) -> tuple[list[tuple[str, str]], list[tuple[str, str, str]]]:
    """Every (kind, setting it reads), and every (kind, setting it does not read, a kind that does)."""
    owner = {name: kind for kind, of in kinds.items() for name in fields(of)}
    read = [(kind, name) for kind, of in kinds.items() for name in fields(of)]
    return read, [(k, name, owner[name]) for k, of in kinds.items() for name in owner if name not in fields(of)]


def refusal(read: Callable[[Content, str], Settings], content: Content) -> str:
    with pytest.raises(InputError) as caught:
        read(content, "run.yaml")
    return str(caught.value)


def ends(capsys: pytest.CaptureFixture, tmp_path: Path, verb: str, content: Content) -> str:
    """The line that `recyclable verb` ends with: exit status 2, nothing else said, nothing written."""
    file = write_config(tmp_path / "run.yaml", {**content, "out": tmp_path / "result"})
    assert main([verb, str(file)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and list(tmp_path.iterdir()) == [file]
    (line,) = said.err.splitlines()
    return line


# ---- methods

METHOD = {name: METHODS.get(name) for name in METHODS.names()}
READ, UNREAD = table(METHOD)


def recycling(method: str, more: Content) -> Content:
    """A run config of a method with these settings as well."""
    return {**minimal(METHOD[method]), "method": method, **more}


@pytest.mark.parametrize(("method", "name"), READ)
def test_a_method_takes_every_setting_of_its_own(method: str, name: str) -> None:
    own = {"method": method, "scale": "auto" if method == "project" else VALUES["scale"]}
    given = own[name] if name in own else value(name, METHOD[method])
    config = read_recycle_settings(recycling(method, {**BESIDE.get(name, {}), name: given}), "run.yaml")
    assert type(config) is METHOD[method]
    assert config.model_dump(mode="json")[name] == given


@pytest.mark.parametrize(("method", "name", "reader"), UNREAD)
def test_a_method_refuses_every_setting_of_the_others(method: str, name: str, reader: str) -> None:
    content = recycling(method, {name: value(name, METHOD[reader])})
    reads = ", ".join(sorted(fields(METHOD[method])))
    assert refusal(read_recycle_settings, content) == f"run.yaml: unknown key {name!r}; method {method} reads {reads}"


def test_the_table_has_what_each_axis_reads_and_what_it_does_not() -> None:
    """So that a setting that moves to where nothing reads it is noticed: by hand, from what each method is."""
    unread = {(method, name) for method, name, _ in UNREAD}
    for untrained in ("apply", "project", "shuffled"):
        assert {(untrained, name) for name in ("max_steps", "learning_rate", "dropout", "related_task")} <= unread
    for labels_alone in ("scratch", "init", "shuffled_init"):
        assert {(labels_alone, name) for name in ("alpha", "beta", "temperature", "teacher", "teacher_cache")} <= unread
    for fresh in ("scratch", "distill"):
        assert {(fresh, name) for name in ("scale", "ties", "dare", "skip_embeddings", "align")} <= unread
    assert {("interpolate", name) for name in ("teacher", "teacher_cache", "teacher_top_k")} <= unread
    taught = {method for method, name in READ if name == "alpha"}
    assert taught == {"distill", "both", "interpolate"}


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("apply", "train_batch_size"),
        ("project", "dropout"),
        ("scratch", "scale"),
        ("init", "start"),
        ("distill", "ties"),
        ("both", "second_base"),
        ("interpolate", "teacher_cache"),
    ],
)
def test_the_command_ends_with_status_2(capsys, tmp_path: Path, method: str, name: str) -> None:
    line = ends(capsys, tmp_path, "recycle", recycling(method, {name: VALUES[name]}))
    reads = ", ".join(sorted(fields(METHOD[method])))
    problem = f"unknown key {name!r}; method {method} reads {reads}"
    assert line == f"recyclable: error: {tmp_path / 'run.yaml'}: {problem}"


def test_a_setting_that_is_misspelt_is_told_how_it_is_spelt() -> None:
    assert refusal(read_recycle_settings, recycling("both", {"tempreature": 2.0})) == (
        "run.yaml: unknown key 'tempreature', did you mean 'temperature'?"
    )


@pytest.mark.parametrize(
    ("method", "given", "name", "why"),
    [
        ("apply", {"strength_examples": 9}, "strength_examples", "but scale: auto"),
        ("both", {"teacher": "online", "teacher_cache": "c"}, "teacher_cache", "with teacher: online"),
        ("distill", {"teacher": "online", "teacher_cache": "c"}, "teacher_cache", "with teacher: online"),
        ("interpolate", {"interpolation_margin": 0.1}, "interpolation_margin", "without interpolation_draws"),
        ("interpolate", {"alpha": 0.5, "alpha_by_point": [0, 0, 1, 1]}, "alpha", "with alpha_by_point"),
        ("interpolate", {"beta": 0.5, "beta_by_point": [0, 0, 1, 1]}, "beta", "with beta_by_point"),
        *[
            ("interpolate", {"start": "fresh", name: VALUES[name]}, name, "with start: fresh")
            for name in ("scale", "ties", "dare", "skip_embeddings")
        ],
    ],
)
def test_a_setting_that_is_read_only_beside_another_is_refused_without_it(
    method: str, given: Content, name: str, why: str
) -> None:
    said = refusal(read_recycle_settings, recycling(method, given))
    assert said == f"run.yaml: {name} is given, but nothing reads it {why}"


@pytest.mark.parametrize("unknown", ["initialise", None, 3, ["init"], {"init": {}}])
def test_a_method_that_is_none_is_told_which_there_are(unknown: Any) -> None:
    said = refusal(read_recycle_settings, recycling("init", {"method": unknown}))
    assert said == f"run.yaml: method is {unknown!r}, expected one of {', '.join(METHODS.names())}"


def test_a_variable_of_the_environment_may_name_the_method(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOW", "init")
    file = write_config(tmp_path / "run.yaml", recycling("init", {"method": "$HOW"}))
    assert type(read_recycle_settings(read_run_file(file), file)) is METHOD["init"]


# ---- kinds of tuning

TUNING = {name: tune_settings(name) for name in TUNINGS.names()}
TUNING_READ, TUNING_UNREAD = table(TUNING)


def tuning_run(tuning: str, more: Content) -> Content:
    """A run config of a kind of tuning with these settings as well."""
    return {**minimal(TUNING[tuning]), "tuning": tuning, **more}


@pytest.mark.parametrize(("tuning", "name"), TUNING_READ)
def test_a_kind_of_tuning_takes_every_setting_of_its_own(tuning: str, name: str) -> None:
    given = tuning if name == "tuning" else value(name, TUNING[tuning])
    config = read_tune_settings(tuning_run(tuning, {name: given}), "run.yaml")
    assert config.model_dump(mode="json")[name] == given
    assert config.described().keys() == TUNINGS.get(tuning).model_fields.keys()


@pytest.mark.parametrize(("tuning", "name", "reader"), TUNING_UNREAD)
def test_a_kind_of_tuning_refuses_every_setting_of_the_others(tuning: str, name: str, reader: str) -> None:
    content = tuning_run(tuning, {name: value(name, TUNING[reader])})
    reads = ", ".join(sorted(fields(TUNING[tuning])))
    assert refusal(read_tune_settings, content) == f"run.yaml: unknown key {name!r}; tuning {tuning} reads {reads}"


@pytest.mark.parametrize(
    ("tuning", "name"), [("full", "lora_r"), ("full", "target_modules"), ("lora", "bottleneck_size")]
)
def test_the_tune_command_ends_with_status_2(capsys, tmp_path: Path, tuning: str, name: str) -> None:
    line = ends(capsys, tmp_path, "tune", tuning_run(tuning, {name: VALUES[name]}))
    assert f"run.yaml: unknown key {name!r}; tuning {tuning} reads adam_beta1, " in line


def test_tuning_that_names_no_kind_is_full_fine_tuning() -> None:
    content = {name: given for name, given in tuning_run("full", {}).items() if name != "tuning"}
    assert read_tune_settings(content, "run.yaml").tuning == "full"
    said = refusal(read_tune_settings, {**content, "lora_dropout": 0.1})
    assert said.startswith("run.yaml: unknown key 'lora_dropout'; tuning full reads adam_beta1, ")


@pytest.mark.parametrize("unknown", ["ladder", 3, ["lora"], {"lora": {}}])
def test_a_kind_of_tuning_that_is_none_is_told_which_there_are(unknown: Any) -> None:
    said = refusal(read_tune_settings, tuning_run("full", {"tuning": unknown}))
    assert said == f"run.yaml: tuning is {unknown!r}, expected one of {', '.join(TUNINGS.names())}"


# ---- pre-training

TAUGHT = {"alpha": 0.4, "beta": 2.0, "temperature": 3.0, "divergence": "jensen_shannon", "mixing": 0.3}
FRESH_HEAD = {"mlm_head_steps": 3, "mlm_head_learning_rate": 0.01}


@pytest.mark.parametrize("name", TAUGHT)
def test_what_a_teacher_is_for_is_refused_without_one(name: str) -> None:
    said = refusal(read_pretrain_settings, {**PRETRAINING, name: TAUGHT[name]})
    assert said == f"run.yaml: {name} is given, but nothing reads it without a teacher"


def test_with_a_teacher_all_of_it_is_read() -> None:
    config = read_pretrain_settings({**PRETRAINING, "teacher": "b", **TAUGHT}, "run.yaml")
    assert type(config) is Masked and config.model_dump(include=set(TAUGHT)) == TAUGHT


@pytest.mark.parametrize("divergence", [None, "forward", "reverse"])
def test_mixing_is_refused_without_jensen_shannon(divergence: str | None) -> None:
    chosen = {} if divergence is None else {"divergence": divergence}
    said = refusal(read_pretrain_settings, {**PRETRAINING, "teacher": "b", **chosen, "mixing": 0.3})
    assert said == f"run.yaml: mixing is given, but nothing reads it with divergence {divergence or 'forward'}"


@pytest.mark.parametrize("name", FRESH_HEAD)
def test_what_a_fresh_head_is_for_is_refused_where_the_head_is_kept(name: str) -> None:
    given = {**PRETRAINING, name: FRESH_HEAD[name]}
    said = refusal(read_pretrain_settings, {**given, "mlm_head": "keep"})
    assert said == f"run.yaml: {name} is given, but nothing reads it with mlm_head: keep"
    for head in ("auto", "fresh"):
        assert getattr(read_pretrain_settings({**given, "mlm_head": head}, "run.yaml"), name) == FRESH_HEAD[name]


@pytest.mark.parametrize("name", ["method", "weights", "task", "tuning", "lora_r"])
def test_pretraining_refuses_what_others_read(name: str) -> None:
    reads = ", ".join(sorted(fields(Masked)))
    said = refusal(read_pretrain_settings, {**PRETRAINING, name: "x"})
    assert said == f"run.yaml: unknown key {name!r}; pretrain reads {reads}"


@pytest.mark.parametrize("given", [{"alpha": 0.4}, {"teacher": "b", "mixing": 0.3}, {"mlm_head": "keep", **FRESH_HEAD}])
def test_the_pretrain_command_ends_with_status_2(capsys, tmp_path: Path, given: Content) -> None:
    assert "is given, but nothing reads it with" in ends(capsys, tmp_path, "pretrain", {**PRETRAINING, **given})
