"""A program that trains with Hugging Face's Trainer, also under torchrun: `trainer_run.py FOLDER MODE OUT`.

FOLDER has a model, its processor and the clips of test_trainer_parallel.py. MODE is a key of `MODES`; with the suffix
`-alone` one process trains without splitting. OUT is the JSON file of losses and gradient norms, and without its suffix
the folder of the trained model.
"""

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import Tensor
from transformers import Trainer, TrainingArguments

from keye import KeyeForConditionalGeneration, KeyeProcessor
from keye.processor.processor import Sample
from keye.video.clip import open_clip

STEPS, GLOBAL_BATCH, ROWS = 3, 4, 8
LEFT_OPEN, WAITING = ExitStack(), []  # a clip that is still being decoded when the program ends


def zero(stage: int) -> dict[str, Any]:
    """Arguments for DeepSpeed, with torch's optimizer and fp32, so that only the splitting differs."""
    return {
        "deepspeed": {
            "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "gradient_clipping": "auto",
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
        }
    }


MODES: dict[str, dict[str, Any]] = {
    "ddp": {"ddp_backend": "gloo"},
    "lora": {"ddp_backend": "gloo"},
    "zero2": zero(2),
    "zero3": zero(3),
    "fsdp": {"fsdp": True, "fsdp_config": {"version": 2}, "ddp_backend": "gloo"},
}


class Rows(torch.utils.data.Dataset):
    """Clips, every third row an image; each is decoded on access."""

    def __init__(self, folder: Path, processor: KeyeProcessor) -> None:
        self.folder, self.processor = folder, processor

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> Sample:
        clip = self.folder / f"{index}.mp4"
        medium: dict[str, Any] = {"type": "video", "video": str(clip)}
        if index % 3 == 2:
            medium = {"type": "image", "image": Image.new("RGB", (56, 56 + 28 * (index % 2)), (20 * index, 90, 40))}
        question = {"role": "user", "content": [medium, {"type": "text", "text": "Which colour?"}]}
        return self.processor.sample([question, {"role": "assistant", "content": "red or blue " * (1 + index % 3)}])


def main(folder: Path, mode: str, out: Path) -> None:
    """Train and write the losses from the first process. A decoder's thread still waits for its reader at exit."""
    processor = KeyeProcessor.from_pretrained(folder)
    alone = mode.endswith("-alone")
    clip = LEFT_OPEN.enter_context(open_clip(folder / "0.mp4", fps=5, max_frames=64))
    WAITING.append(iter(clip))
    next(WAITING[0])
    split = {} if alone else MODES[mode]
    if "deepspeed" in split:  # its shared-memory all-reduce is for inference, and takes minutes to compile
        from deepspeed.ops import __compatible_ops__

        __compatible_ops__["deepspeed_shm_comm"] = False
    arguments = TrainingArguments(
        str(out.parent / f"{out.stem}-trainer"), max_steps=STEPS, learning_rate=3e-3, lr_scheduler_type="constant",
        per_device_train_batch_size=GLOBAL_BATCH // (1 if alone else 2), logging_steps=1, seed=1,
        report_to=[], use_cpu=True, save_strategy="no", remove_unused_columns=False, disable_tqdm=True, **split,
    )  # fmt: skip
    if "fsdp" in split:  # accelerate supports FSDP on GPUs only, and silently uses DDP on a CPU
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    model: Any = KeyeForConditionalGeneration.from_pretrained(folder)
    if mode.startswith("lora"):
        torch.manual_seed(0)
        adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "fc1"], task_type="CAUSAL_LM")
        model = get_peft_model(model, adapter)

    def collate(samples: list[Sample]) -> dict[str, Tensor]:
        return processor.collate(samples)

    trainer = Trainer(model, arguments, data_collator=collate, train_dataset=Rows(folder, processor))
    trainer.train()
    trainer.save_model(str(out.with_suffix("")))
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    norms = [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]
    wrapped = type(trainer.model_wrapped).__name__
    if trainer.is_world_process_zero():
        out.write_text(
            json.dumps({"losses": losses, "norms": norms, "world": arguments.world_size, "wrapped": wrapped})
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
