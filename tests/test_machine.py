"""The ds_config: what it may say, what run.yaml adds, and that DeepSpeed accepts what ships."""

from __future__ import annotations

import json

import pytest

from recyclable import machine
from recyclable.errors import InputError
from recyclable.resources import ds_config_path

SHIPPED = sorted(path.stem for path in ds_config_path("cpu").parent.glob("*.json"))


def merged(ds_config: dict, **changes) -> dict:
    run = {"train_batch_size": 16, "max_grad_norm": 1.0, "world_size": 2, "on_cpu": True, **changes}
    return machine.merge(ds_config, where="ds.json", **run)


def refusal(ds_config: dict, **changes) -> str:
    with pytest.raises(InputError) as caught:
        merged(ds_config, **changes)
    return str(caught.value)


def test_everything_left_out_is_filled_in_from_the_run():
    config = merged({"zero_optimization": {"stage": 2}}, max_grad_norm=0.5)
    assert config["train_batch_size"] == 16
    assert config["train_micro_batch_size_per_gpu"] == 8
    assert config["gradient_accumulation_steps"] == 1
    assert config["gradient_clipping"] == 0.5


@pytest.mark.parametrize(
    ("given", "micro", "steps"),
    [
        ({"train_micro_batch_size_per_gpu": 2}, 2, 4),
        ({"gradient_accumulation_steps": 2}, 4, 2),
        ({"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2, "train_batch_size": 16}, 4, 2),
    ],
)
def test_micro_batch_and_accumulation_complete_each_other(given, micro, steps):
    config = merged(given)
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (micro, steps)


def test_no_clipping_is_written_out_because_deepspeed_clips_by_default():
    assert merged({}, max_grad_norm=0)["gradient_clipping"] == 0.0


def test_the_callers_dict_and_monitor_sections_are_left_alone():
    given = {"tensorboard": {"enabled": True, "output_path": "logs"}, "zero_optimization": {"stage": 1}}
    before = json.dumps(given)
    assert merged(given)["tensorboard"] == given["tensorboard"]
    assert json.dumps(given) == before


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"train_batch_size": 32}, ["ds.json", "train_batch_size is 32", "run.yaml", "16"]),
        ({"gradient_clipping": 0.1}, ["gradient_clipping is 0.1", "max_grad_norm in run.yaml is 1.0"]),
        ({"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}, ["zero_optimization.reduce_bucket_size"]),
        ({"aio": {"list": [1, "auto"]}}, ["aio.list[1]", '"auto"']),
        ({"optimizer": {"type": "AdamW"}}, ["'optimizer'", "learning_rate", "weight_decay"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["'scheduler'", "lr_scheduler_type", "warmup_steps"]),
        ({"elasticity": {"enabled": True}}, ["'elasticity'"]),
        ({"tensor_parallel": {"autotp_size": 2}}, ["'tensor_parallel'", "stage 3"]),
        ({"zero_optimisation": {}}, ["'zero_optimisation'", "did you mean 'zero_optimization'"]),
        ({"zero_optimization": {"stage": 2, "overlap_com": True}}, ["'overlap_com'", "'overlap_comm'"]),
        ({"zero_optimization": {"stage": 4}}, ["stage is 4", "0, 1, 2 or 3"]),
        ({"zero_optimization": {"stage": "2"}}, ["stage is '2'"]),
        ({"zero_optimization": True}, ["zero_optimization is True", "object"]),
        ({"fp16": {"enabled": True}}, ["fp16", "CPU"]),
        ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, ["torch_autocast", "CPU"]),
        ({"torch_autocast": {"enabled": True}}, ["torch_autocast.dtype is None", "'bfloat16' or 'float16'"]),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, ["both"]),
        ({"bf16": True}, ["bf16 is True", "object"]),
        ({"activation_checkpointing": True}, ["activation_checkpointing is True", "object"]),
        ({"activation_checkpointing": {"profile": True}}, ["'profile'", "expected cpu_checkpointing"]),
        ({"activation_checkpointing": {"cpu_checkpointing": 1}}, ["cpu_checkpointing is 1", "true or false"]),
        ({"zero_optimization": {"stage": 3, "offload_param": "cpu"}}, ["offload_param is 'cpu'", "none, cpu, nvme"]),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "disk"}}}, ["'disk'", "none, cpu, nvme"]),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, ["at stage 2", "expected stage 3"]),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}, ["'nvme' at stage 2"]),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, ["at stage 0", "stage 1"]),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": 5}}},
            ["offload_param.nvme_path is 5"],
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "buffer_size": "big"}}},
            ["offload_param.buffer_size is 'big'", "expected a number"],
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "buffer_count": -1}}},
            ["offload_optimizer.buffer_count is -1", "expected a number"],
        ),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "large"}}, ["reduce_bucket_size is 'large'"]),
        ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, ["round_robin_gradients is true"]),
        ({"zero_optimization": {"stage": 2, "compute_grad_norm": False}}, ["compute_grad_norm is false"]),
        ({"bf16": {"enabled": True, "check_grad_overflow": False}}, ["bf16.check_grad_overflow is false"]),
        ({"gradient_allreduce_op": "sum"}, ["gradient_allreduce_op", "'mean'"]),
        ({"train_micro_batch_size_per_gpu": 3}, ["3 x 2 ranks", "train_batch_size 16", "use 2 here", "multiple of 6"]),
        ({"train_micro_batch_size_per_gpu": 32}, ["use 8 here", "multiple of 64"]),
        ({"train_micro_batch_size_per_gpu": 0}, ["is 0", "at least 1"]),
        ({"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}, ["2 x", "3 x 2 ranks = 12"]),
    ],
)
def test_a_mistake_is_refused_in_one_line_that_names_it(given, words):
    message = refusal(given)
    assert "\n" not in message
    assert [word for word in words if word not in message] == []


def test_a_batch_that_ranks_cannot_share_is_the_runs_mistake():
    assert "run.yaml: train_batch_size 15" in refusal({}, train_batch_size=15)


def test_gradient_checkpointing_is_asked_for_on_either_side_and_never_denied_on_the_other():
    on_host = {"activation_checkpointing": {"cpu_checkpointing": True}}
    for given, wanted, recomputes, on in (
        ({}, None, False, False),
        ({}, False, False, False),
        ({}, True, True, False),
        ({"activation_checkpointing": {}}, None, True, False),
        (on_host, True, True, True),
    ):
        config = merged(given, gradient_checkpointing=wanted)
        assert (machine.recomputes(config), machine.saves_on_host(config)) == (recomputes, on)
    message = refusal(on_host, gradient_checkpointing=False)
    assert "activation_checkpointing is given" in message and "gradient_checkpointing in run.yaml is false" in message


def test_fp16_passes_on_a_gpu():
    assert merged({"fp16": {"enabled": True}}, on_cpu=False)["fp16"] == {"enabled": True}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("zero", [{}, {"zero_optimization": {"stage": 0, "reduce_bucket_size": 5}}])
def test_fp16_at_stage_0_is_run_as_stage_1(zero: dict, ranks: int):
    given = {"fp16": {"enabled": True}, **zero}
    run = machine.as_run(given, ranks)
    assert run == {**given, "zero_optimization": {**zero.get("zero_optimization", {}), "stage": 1}}
    assert machine.zero_stage(given) == 0
    assert machine.as_run({**zero, "fp16": {"enabled": False}}, ranks) == {**zero, "fp16": {"enabled": False}}
    assert machine.zero_stage(machine.as_run({**given, "zero_optimization": {"stage": 2}}, ranks)) == 2


def test_deepspeeds_timer_of_throughput_is_off_unless_timers_are_given():
    assert merged({})["timers"] == {"throughput": {"enabled": False}}
    for given in ({}, {"throughput": {"enabled": True}}):
        assert merged({"timers": given})["timers"] == given


def test_stage_and_precision_are_read_from_a_config():
    assert (machine.zero_stage({}), machine.zero_stage({"zero_optimization": {"stage": 3}})) == (0, 3)
    assert (machine.is_bf16({}), machine.is_bf16({"bf16": {"enabled": True}})) == (False, True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b'{"bf16": {"enabled": true},}', ["broken JSON: line 1, column 2"]),
        (b'{"steps_per_print": 1,\n "steps_per_print": 2}', ["'steps_per_print' stands in it twice"]),
        (b"[1]", ["holds list"]),
        (b"\xff{}", ["UTF-8"]),
    ],
)
def test_a_file_that_is_no_config_is_refused_by_name(tmp_path, text, words):
    path = tmp_path / "ds.json"
    path.write_bytes(text)
    with pytest.raises(InputError) as caught:
        machine.load_ds_config(path)
    assert [word for word in [str(path), *words] if word not in str(caught.value)] == []


@pytest.fixture(scope="module")
def deepspeed_config():
    """DeepSpeed's own reader, on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        from deepspeed.runtime.config import DeepSpeedConfig

        yield DeepSpeedConfig


@pytest.mark.parametrize("name", SHIPPED)
def test_deepspeed_accepts_every_shipped_config(name, deepspeed_config, monkeypatch):
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda: 0)
    monkeypatch.setattr("deepspeed.comm.get_world_size", lambda: 8)
    config = merged(machine.load_ds_config(name), train_batch_size=512, world_size=8, on_cpu=False)
    read = deepspeed_config(config)
    assert read.train_batch_size == 512
    assert read.train_micro_batch_size_per_gpu * read.gradient_accumulation_steps == 64
    assert read.zero_optimization_stage == machine.zero_stage(config)
    assert read.bfloat16_config.enabled is machine.is_bf16(config)


class Watched(dict):
    """Remembers which keys were asked for."""

    def __init__(self, content: dict) -> None:
        super().__init__(content)
        self.asked: set[str] = set()

    def __copy__(self):
        return self

    def __contains__(self, key) -> bool:
        self.asked.add(key)
        return super().__contains__(key)

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def keys(self):
        return self  # `key in config.keys()` then ends up above


def test_the_known_keys_are_the_ones_deepspeed_reads(deepspeed_config):
    watched = Watched({"train_batch_size": 4})
    deepspeed_config(watched)
    assert machine.KNOWN_KEYS - watched.asked == set()
    # what DeepSpeed also reads: refused here, removed from it (and refused by it), or for engines not used here
    others = "eigenvalue graph_harvesting nebula sparse_attention sparse_gradients"
    others += " seq_parallel_communication_data_type use_data_before_expert_parallelism"
    assert watched.asked - machine.KNOWN_KEYS - machine.REFUSED.keys() == set(others.split())


def test_the_known_zero_keys_are_deepspeeds(deepspeed_config):
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    assert fields == machine.KNOWN_ZERO_KEYS
