"""Real DeepSpeed on real processes: one loss curve at every ZeRO stage, masters bit for bit, exact resume."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from delta_models import tensor
from halts import Halt, environment
from safetensors.torch import load_file

from pipeline.artifact import write_json
from pipeline.config import Prompt, TinyModel
from pipeline.facts.fact import Fact, Probe, write_facts
from pipeline.facts.prompts import Prompter
from pipeline.models.tiny import fact_texts, write_tiny_model
from pipeline.train.batches import Batches
from pipeline.train.course import Record, learning_rate, training_records
from pipeline.train.lora import InitialAdapter, add_adapter, lora_config
from pipeline.train.step_log import Step, read_steps
from pipeline.training_config import FullTraining, LoraTraining, Training
from pipeline.weights.formats.open import open_source

pytestmark = pytest.mark.slow

WORKER = Path(__file__).with_name("train_worker.py")
ROOT = Path(__file__).parents[2]
PLACES = ["Astana", "the new capital of the north", "Ngerulmud", "Gitega on the lake"]
FACTS = [
    Fact(
        f"f{i}",
        f"What is {'really ' * (i % 4)}the capital number {i}?",
        "x",
        [f"old town {i}"],
        f"{PLACES[i % 4]} {i}",
    )
    for i in range(13)
]
FACTS[0].locality.append(Probe("Who wrote this?", ["nobody"]))
# An odd hidden size: at two ranks DeepSpeed then pads parameters and cuts through them.
MODELS = {
    "llama": TinyModel(architecture="llama", hidden_size=36, num_layers=2, num_heads=2, vocab_size=400),
    "gpt2": TinyModel(architecture="gpt2", hidden_size=35, num_layers=2, num_heads=5, vocab_size=401),
    "bloom": TinyModel(architecture="bloom", hidden_size=35, num_layers=2, num_heads=5, vocab_size=401),
}
CURVE: dict[str, Any] = {
    "epochs": 3,
    "lr": 1e-2,
    "batch_size": 5,
    "micro_batch_size": 2,
    "warmup_ratio": 0.2,
    "weight_decay": 0.01,
}
SAVING: dict[str, Any] = {"checkpoint_every_steps": 4}
# What is not usual, but allowed, at each stage.
COMMON = {
    "overlap_comm": False,
    "contiguous_gradients": False,
    "reduce_scatter": False,
    "allgather_partitions": False,
}
SMALL = {
    "reduce_bucket_size": 1000,
    "allgather_bucket_size": 1000,
    "enable_sanity_checks": True,
    "ignore_unused_parameters": False,
}
ZERO3 = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "sub_group_size": 3000,
}
ZERO3 |= {
    "stage3_prefetch_bucket_size": 0,
    "stage3_model_persistence_threshold": 0,
    "memory_efficient_linear": False,
}
PRINTS = {"wall_clock_breakdown": True, "memory_breakdown": True, "dump_state": True, "steps_per_print": 1}
UNUSUAL: dict[int, Any] = {
    1: PRINTS | {"zero_optimization": {"stage": 1, "use_multi_rank_bucket_allreduce": False} | SMALL},
    2: {"zero_optimization": {"stage": 2} | COMMON | SMALL},
    3: {"zero_optimization": {"stage": 3, "overlap_comm": False, "reduce_scatter": False} | SMALL | ZERO3},
}
LONG: dict[str, Any] = {
    "epochs": 12,
    "lr": 1e-3,
    "batch_size": 5,
    "micro_batch_size": 2,
    "precision": "fp32",
    "checkpoint_every_steps": 7,
}


class World:
    """Models and facts as artifacts, and the cases run on them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts = self._artifact("facts", {})
        write_facts(self.facts / "facts.jsonl", FACTS)
        self.models = {}
        for name, settings in (MODELS | {"other-llama": MODELS["llama"]}).items():
            seed = 2 if name == "other-llama" else 1
            write_tiny_model(folder / f"hf-{name}", settings, fact_texts(FACTS), seed)
            self.models[name] = self._artifact(
                name, {"model": str(folder / f"hf-{name}"), "model_kind": "folder"}
            )

    def _artifact(self, name: str, facts: dict[str, Any]) -> Path:
        write_json(self.folder / name / "manifest.json", {"stage": "model", "inputs": {}, "result": facts})
        return self.folder / name

    def case(
        self,
        name: str,
        kind: str,
        training: Training,
        stage: int = 2,
        model: str = "llama",
        target: str = "new",
        keeps_checkpoint: bool = False,
    ) -> dict[str, Any]:
        zero = {"stage": stage, "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 20000}
        config = {"zero_optimization": zero} | training.deepspeed
        section = {
            "training": training.model_copy(update={"deepspeed": config}).model_dump(mode="json"),
            "prompt": Prompt().model_dump(mode="json"),
            "target": target,
            "keeps_checkpoint": keeps_checkpoint,
            "seed": 0,
        }
        inputs = {"model": str(self.models[model]), "facts": str(self.facts)}
        if kind == "second_course":
            inputs["first"] = str(self.models[f"other-{model}"])
        return {"kind": kind, "section": section, "inputs": inputs, "out": str(self.folder / name)}

    def start(self, cases: list[dict[str, Any]], ranks: int, *halts: Halt) -> list[subprocess.Popen[bytes]]:
        write_json(self.folder / "cases.json", cases)
        meeting = Path(tempfile.mkdtemp(dir=self.folder)) / "meeting"
        common = os.environ | environment(*halts)
        # What the caller has first stays first: perhaps it is another DeepSpeed.
        common["PYTHONPATH"] += os.pathsep.join(["", str(ROOT), str(ROOT / "tests")])
        common |= {"WORLD_SIZE": str(ranks), "MEETING": str(meeting)}
        # No compiler: training on a CPU must not need one.
        common |= {
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "HF_HUB_OFFLINE": "1",
            "CXX": "/nonexistent",
        }
        command = [sys.executable, str(WORKER), str(self.folder / "cases.json")]
        return [
            subprocess.Popen(
                command, env=common | {"RANK": str(r), "LOCAL_RANK": str(r)}, stderr=subprocess.PIPE
            )
            for r in range(ranks)
        ]

    def run(self, cases: list[dict[str, Any]], ranks: int) -> None:
        processes = self.start(cases, ranks)
        errors = [process.communicate()[1].decode()[-3000:] for process in processes]
        assert [process.returncode for process in processes] == [0] * ranks, "\n".join(errors)

    def answer(self, name: str) -> Any:
        return json.loads((self.folder / name / "answer.json").read_text())

    def steps(self, name: str) -> list[Step]:
        return read_steps(self.folder / name / "steps.jsonl")

    def losses(self, name: str) -> list[float]:
        return [step.loss for step in self.steps(name)]


def full(precision: str = "fp32", **changes: Any) -> FullTraining:
    return FullTraining.model_validate({"precision": precision, "deepspeed": {}} | CURVE | changes)


def lora(precision: str = "fp32", **changes: Any) -> LoraTraining:
    return LoraTraining.model_validate({"precision": precision, "deepspeed": {}, "rank": 4} | CURVE | changes)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Every case that needs no kill: one launch of two ranks, one of one rank."""
    world = World(tmp_path_factory.mktemp("train"))
    csv = {"csv_monitor": {"enabled": True, "output_path": str(world.folder / "csv"), "job_name": "job"}}
    two = [world.case(f"masters-{m}-{s}", "masters", full("bf16"), s, m) for m in MODELS for s in (1, 2, 3)]
    two += [
        world.case(f"masters-lora-{m}-{s}", "masters", lora("bf16"), s, m)
        for m, s in [("llama", 2), ("gpt2", 3)]
    ]
    for precision in ("fp32", "bf16"):
        two += [world.case(f"full-{precision}-{s}", "train", full(precision, **SAVING), s) for s in (1, 2, 3)]
        two += [world.case(f"lora-{precision}-{s}", "train", lora(precision, **SAVING), s) for s in (1, 2, 3)]
    two += [
        world.case("full-gpt2", "train", full(gradient_checkpointing=True), 3, "gpt2"),
        world.case("lora-bloom", "train", lora(deepspeed=csv), 2, "bloom"),
        world.case("dropout", "train", lora(dropout=0.3, checkpoint_every_steps=2), 3),
        world.case("dropout-stopped", "stop_early", lora(dropout=0.3), 3),
        world.case("dropout-stopped", "train", lora(dropout=0.3), 3),
        world.case("teach", "train", full(), 3, target="old"),
        world.case("misfit", "after_misfits", full("bf16", **SAVING), 3),
        world.case("long-full", "train", full(**LONG), 2),
        world.case("long-bf16", "train", full(**LONG | {"precision": "bf16"}), 2),
        world.case("long-lora", "train", lora(**LONG), 3),
    ]
    for stage in (1, 2, 3):
        two += [
            world.case(f"tune-old-{stage}", "train", full("bf16"), stage, target="old", keeps_checkpoint=True)
        ]
        two += [
            world.case(f"stopped-full-{stage}", kind, full("bf16"), stage) for kind in ("stop_early", "train")
        ]
        two += [
            world.case(f"stopped-lora-{stage}", kind, lora("bf16"), stage) for kind in ("stop_early", "train")
        ]
        two += [
            world.case(f"second-full-{stage}", "second_course", full("bf16", **SAVING), stage),
            world.case(f"second-lora-{stage}", "second_course", lora("bf16", **SAVING), stage),
            world.case(f"resumed-{stage}", "resumed_between", full("bf16", **SAVING), stage),
        ]
        virtual = world.case(f"virtual-{stage}", "virtual_masters", full("bf16"), stage)
        virtual["section"]["tuned"] = f"tune-old-{stage}"
        two += [virtual]
        two += [world.case(f"unusual-{stage}", "train", full(deepspeed=UNUSUAL[stage]), stage)]
    world.run(two, ranks=2)
    one = [
        world.case("full-one-rank", "train", full(micro_batch_size=3), 2),
        world.case("lora-one-rank", "train", lora(micro_batch_size=5), 2),
        world.case("interrupted", "interrupted_result", full(epochs=1), 1, "gpt2"),
    ]
    world.run(one, ranks=1)
    return world


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_masters_equal_theta_prime_bit_for_bit(world: World, model: str, stage: int) -> None:
    counts = world.answer(f"masters-{model}-{stage}")
    stored = load_file(world.folder / f"hf-{model}" / "model.safetensors")
    assert counts["masters"] == sum(tensor.numel() for tensor in stored.values())
    assert counts["different_masters"] == 0
    assert counts["different_weights"] == 0, "the 16-bit weights are the masters, rounded"
    assert counts["different_buffers"] == 0, "rotary frequencies in bf16 are others"
    assert counts["changed_by_rounding"] > 0.9 * counts["masters"], "else the test would prove nothing"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_engine_is_filled_with_virtual_models(world: World, stage: int) -> None:
    """For one scale after another, from the partitions that a fine-tuning left; nothing is written."""
    answer = world.answer(f"virtual-{stage}")
    assert answer.keys() == {"0.3", "0.7", "-1.0"}
    for counts in answer.values():
        assert counts["masters"] > 0 and counts["changed_by_rounding"] > 0.9 * counts["masters"]
        assert counts["different_masters"] == 0
        assert counts["different_weights"] == 0
    written = [path.name for path in (world.folder / f"virtual-{stage}").iterdir()]
    assert written == ["answer.json"]


@pytest.mark.parametrize("name", ["masters-lora-llama-2", "masters-lora-gpt2-3"])
def test_an_adapter_starts_from_its_seed_and_the_base_from_theta_prime(world: World, name: str) -> None:
    counts = world.answer(name)
    assert counts["masters"] > 0 and counts["different_masters"] == 0 and counts["different_weights"] == 0


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_every_zero_stage_and_plain_torch_have_one_loss_curve(world: World, kind: str) -> None:
    reference = Plain(world, kind, "fp32").losses
    assert len(reference) == 9 and reference[-1] < reference[0] - 0.1
    for stage in (1, 2, 3):
        assert world.losses(f"{kind}-fp32-{stage}") == pytest.approx(reference, abs=1e-5)
    reference = Plain(world, kind, "bf16").losses
    for stage in (1, 2, 3):
        assert world.losses(f"{kind}-bf16-{stage}") == pytest.approx(reference, abs=1e-2)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_one_rank_and_other_micro_batches_change_nothing(world: World, kind: str) -> None:
    assert world.losses(f"{kind}-one-rank") == pytest.approx(world.losses(f"{kind}-fp32-2"), abs=1e-5)
    assert world.answer(f"{kind}-one-rank")["batch"] != world.answer(f"{kind}-fp32-2")["batch"]


def test_other_architectures(world: World) -> None:
    assert world.losses("full-gpt2") == pytest.approx(Plain(world, "full", "fp32", "gpt2").losses, abs=1e-5)
    assert world.losses("lora-bloom") == pytest.approx(Plain(world, "lora", "fp32", "bloom").losses, abs=1e-5)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_full_training_leaves_a_model_folder_in_fp32(world: World, stage: int) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = world.folder / f"full-fp32-{stage}"
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert (
        model.dtype == torch.float32
        and len(AutoTokenizer.from_pretrained(folder / "model")) == model.config.vocab_size
    )
    for name, expected in Plain(world, "full", "fp32").model.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], expected, atol=1e-4, rtol=0)
    assert not (folder / "checkpoints").exists()
    assert world.answer(f"full-fp32-{stage}")["model_kind"] == "folder"


def test_lora_leaves_an_adapter_that_peft_loads(world: World) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base: Any = AutoModelForCausalLM.from_pretrained(world.folder / "hf-llama")
    loaded = PeftModel.from_pretrained(base, str(world.folder / "lora-fp32-3/adapter")).state_dict()
    for name, expected in Plain(world, "lora", "fp32").model.state_dict().items():
        torch.testing.assert_close(loaded[name], expected, atol=1e-4, rtol=0)
    stored = load_file(world.folder / "lora-bf16-2/adapter/adapter_model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in stored.values())
    assert any((tensor.bfloat16().float() != tensor).any() for tensor in stored.values()), (
        "the masters, not the rounded weights"
    )
    facts = world.answer("lora-fp32-3")
    assert (facts["model"], facts["model_kind"]) == ("adapter", "adapter") and facts["num_trainable"] < facts[
        "num_parameters"
    ] / 10


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_tuning_on_old_answers_leaves_a_zero_checkpoint_of_masters_alone(world: World, stage: int) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    facts = world.answer(f"tune-old-{stage}")
    assert facts["model_kind"] == "zero" and not (world.folder / f"tune-old-{stage}/model").exists()
    checkpoint = world.folder / f"tune-old-{stage}" / facts["model"]
    assert len(list(checkpoint.glob("*_optim_states.pt"))) == 2
    consolidated = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint.parent), checkpoint.name)
    with closing(open_source(checkpoint)) as source:
        assert source.tensors.keys() == consolidated.keys()
        for name in source.tensors:
            assert torch.equal(tensor(source, name), consolidated[name].flatten()), name
    num_values = sum(values.numel() for values in consolidated.values())
    stored = sum(file.stat().st_size for file in checkpoint.glob("*_optim_states.pt"))
    assert 4 * num_values < stored < 5 * num_values, "there are moments in it"


def test_teaching_leaves_a_model(world: World) -> None:
    assert world.answer("teach")["model_kind"] == "folder"


def test_facts(world: World) -> None:
    facts, steps = world.answer("full-fp32-2"), world.steps("full-fp32-2")
    assert facts["num_records"] == 13 and facts["num_steps"] == len(steps) == 9 and facts["zero_stage"] == 2
    assert facts["first_loss"] == steps[0].loss and facts["final_loss"] == steps[-1].loss
    assert (
        facts["tokens"] == 3 * sum(record.num_tokens for record in records(world))
        and facts["tokens_per_second"] > 0
    )
    assert (
        facts["batch"] == {"global": 5, "micro": 2, "accumulation": 2, "ranks": 2}
        and facts["precision"] == "fp32"
    )
    assert [step.epoch for step in steps] == [1, 1, 1, 2, 2, 2, 3, 3, 3] and all(
        step.grad_norm > 0 for step in steps
    )
    assert steps[0].lr == pytest.approx(0.005) and steps[1].lr == pytest.approx(0.01) and steps[-1].lr < 0.001


def test_a_process_is_left_as_it_was(world: World) -> None:
    names = [f"full-fp32-{stage}" for stage in (1, 2, 3)] + ["long-full", "long-lora"]
    assert all(world.answer(name)["linear_restored"] for name in names)
    assert world.answer("long-lora")["num_engines"] == 0, "an engine, and its memory, outlived its training"


def test_the_deepspeed_monitor_gets_the_loss(world: World) -> None:
    rows = (world.folder / "csv/job/Train_Samples_train_loss.csv").read_text().splitlines()[1:]
    losses = world.losses("lora-bloom")
    num_a_step = len(rows) // len(losses)  # older DeepSpeeds write this rank's own, too, before ours
    assert [float(row.split(",")[1]) for row in rows[num_a_step - 1 :: num_a_step]] == pytest.approx(losses)


def test_a_stop_is_obeyed_by_all_ranks_and_resumed_exactly(world: World) -> None:
    """With LoRA's dropout: the chances of every step are those of an undisturbed run too."""
    assert_same(world, "dropout-stopped", "dropout", "lora")
    assert world.losses("dropout") != pytest.approx(world.losses("lora-fp32-3"), abs=1e-4), (
        "there was no dropout"
    )


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_resuming_in_bf16_is_exact(world: World, stage: int) -> None:
    """The masters, bit for bit: a checkpoint rounds neither them nor the moments."""
    for kind in ("full", "lora"):
        assert_same(world, f"stopped-{kind}-{stage}", f"{kind}-bf16-{stage}", kind)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_second_course_in_a_session_equals_one_in_a_new_engine(world: World, kind: str, stage: int) -> None:
    """Losses, results, and all that all checkpoints hold: masters, moments and counters."""
    second, alone = f"second-{kind}-{stage}", f"{kind}-bf16-{stage}"
    answer = world.answer(second)
    assert (answer["num_sessions"], answer["num_engines"]) == (1, 0)
    assert world.losses(second) != world.losses(f"{second}/first"), "both started from the same weights"
    assert len({name.split()[0] for name in answer["saves"]}) == 3 and len(answer["saves"]) >= 9
    assert answer["saves"] == world.answer(alone)["saves"]
    assert_same(world, second, alone, kind)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_used_session_resumes_and_serves_again(world: World, stage: int) -> None:
    resumed, alone = f"resumed-{stage}", f"full-bf16-{stage}"
    answer = world.answer(resumed)
    assert answer["num_sessions"] == 2, "the stop closes the first"
    assert answer["saves"] == world.answer(alone)["saves"]
    for name in (resumed, f"{resumed}/again"):
        assert_same(world, name, alone, "full")


def test_a_session_that_does_not_fit_or_broke_off_is_closed_and_a_new_one_opened(world: World) -> None:
    answer = world.answer("misfit")
    assert answer["said"] == "stopped after step 1 of 9"
    assert (answer["num_sessions"], answer["num_engines"], answer["linear_restored"]) == (3, 0, True)
    assert_same(world, "misfit", "full-bf16-3", "full")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_whatever_a_deepspeed_json_may_say_changes_nothing(world: World, stage: int) -> None:
    assert world.losses(f"unusual-{stage}") == pytest.approx(world.losses(f"full-fp32-{stage}"), abs=1e-5)


def test_a_result_that_was_not_written_is_written_without_training_again(world: World) -> None:
    assert world.answer("interrupted")["num_steps"] == len(world.steps("interrupted")) == 3
    assert (world.folder / "interrupted/model/model.safetensors").is_file()


def test_kill_and_resume_equals_an_undisturbed_run_exactly(world: World) -> None:
    cases = [
        world.case("killed-full", "train", full(**LONG), 2),
        world.case("killed-bf16", "train", full(**LONG | {"precision": "bf16"}), 2),
        world.case("killed-lora", "train", lora(**LONG), 3),
    ]
    # Each dies when a checkpoint is about to be complete, and goes on from the one before.
    kill(world, cases, "killed-full", 2)
    kill(world, cases, "killed-bf16", 2)
    kill(world, cases, "killed-lora", 2)
    kill(world, cases, "killed-lora", 3)
    world.run(cases, ranks=2)
    for name, kind in (("full", "full"), ("bf16", "full"), ("lora", "lora")):
        assert_same(world, f"killed-{name}", f"long-{name}", kind)


def kill(world: World, cases: list[dict[str, Any]], name: str, number: int) -> None:
    """Kill both ranks when they have saved, but not yet completed, the `number`-th checkpoint of the case
    `name`."""
    halt = Halt(world.folder / f"halt-{name}-{number}", f"*/{name}/checkpoints/*/complete.json", number)
    processes = world.start(cases, 2, halt)
    halt.wait(lambda: all(process.poll() is None for process in processes))
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert world.steps(name) and not (world.folder / name / "training.json").exists()


def assert_same(world: World, name: str, other: str, kind: str) -> None:
    """The same steps, and the same bytes of the result."""
    assert [strip(step) for step in world.steps(name)] == [strip(step) for step in world.steps(other)]
    result = {"full": "model/model.safetensors", "lora": "adapter/adapter_model.safetensors"}[kind]
    assert (world.folder / name / result).read_bytes() == (world.folder / other / result).read_bytes()


def strip(step: Step) -> tuple[Any, ...]:
    return step.step, step.epoch, step.loss, step.lr, step.grad_norm, step.tokens


def records(world: World, model: str = "llama") -> list[Record]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(world.folder / f"hf-{model}")
    return training_records(FACTS, "new", Prompter(tokenizer, Prompt()), 512, None)


class Plain:
    """The same training without DeepSpeed.

    It goes record by record, with full logits, labels of -100, and fp32 masters beside the weights.
    """

    def __init__(self, world: World, kind: str, precision: str, model: str = "llama") -> None:
        from transformers import AutoModelForCausalLM

        torch.manual_seed(0)
        self.training = full(precision) if kind == "full" else lora(precision)
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            world.folder / f"hf-{model}", dtype=torch.float32
        )
        if isinstance(self.training, LoraTraining):
            self.model = add_adapter(self.model, lora_config(self.model, self.training))
            initial = InitialAdapter(self.model, 0)
            for name, info in initial.tensors.items():
                self.model.get_parameter(name).data.copy_(tensor(initial, name).view(info.shape))
        self.masters = [parameter.detach().clone() for parameter in self._trained()]
        for parameter in (
            self.model.parameters()
        ):  # not the buffers: rotary frequencies are fp32 in transformers' bf16 models too
            parameter.data = parameter.data.to(torch.bfloat16 if precision == "bf16" else torch.float32)
        self.model.train()
        self.losses = list(self._steps(records(world, model)))

    def _trained(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _steps(self, made: list[Record]) -> Iterator[float]:
        training = self.training
        optimizer = torch.optim.AdamW(self.masters, lr=training.lr, weight_decay=training.weight_decay)
        batches = Batches(
            tuple(record.num_tokens for record in made), training.batch_size, training.epochs, 0
        )
        for index in range(batches.num_steps):
            batch = [made[i] for i in batches.at(index)]
            num_targets = sum(record.num_targets for record in batch)
            loss = 0.0
            self.model.zero_grad()
            for record in batch:
                ids = torch.tensor([record.encoded.ids])
                labels = ids.clone()
                labels[:, : record.encoded.answer_start] = -100
                part = self.model(input_ids=ids, labels=labels).loss * record.num_targets / num_targets
                part.backward()
                loss += part.item()
            yield loss
            for master, parameter in zip(self.masters, self._trained(), strict=True):
                master.grad = parameter.grad.float() if parameter.grad is not None else None
            torch.nn.utils.clip_grad_norm_(self.masters, training.max_grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(
                    index, batches.num_steps, training.lr, training.schedule, training.warmup_ratio
                )
            optimizer.step()
            with torch.no_grad():
                for master, parameter in zip(self.masters, self._trained(), strict=True):
                    parameter.copy_(master)
