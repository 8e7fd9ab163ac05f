"""A walk in a trained model: chunks are watched, then dreamed, saved after each chunk, and compared with the truth."""

import math
from dataclasses import asdict
from pathlib import Path as Folder

import torch
from torch import Tensor

from keye.dream.episode import Episode, FastSettings
from keye.dream.measure import consistency, cuts, from_memory, psnr
from keye.dream.model import DreamModel
from keye.dream.scenes import CHUNK, Path
from stages.dream.slow import progress
from stages.dream.state import digest, record_inputs


def dream_walk(
    model: DreamModel, path: Path, settings: FastSettings, seed: int, folder: Folder | None = None
) -> Tensor:
    """Watch the way out, dream the rest; the frames [N, 3, S, S], on the CPU.

    Args:
        folder: the walk is saved there after each chunk, and continued if it has been begun there.

    Raises:
        CheckpointError: the walk in the folder was begun with another model, path, seed or other settings.
    """
    frames = path.frames
    if folder is not None:
        inputs = {
            "model": digest(model.state_dict().values()),
            "path": digest([frames]),
            "actions": [int(one) for one in path.actions],
        }
        inputs |= {"watched chunks": path.outward, "settings": asdict(settings), "seed": seed}
        record_inputs(folder / "inputs.json", inputs)
    with Episode(model, frames[:1].to(next(model.parameters()).device), settings, seed) as episode:
        if folder is not None and (folder / "episode.json").exists():
            episode.load(folder)
        begin = len(episode.edges) - 2
        with progress(settings.write, len(path.actions), begin) as advance:
            for chunk in range(begin, len(path.actions)):
                start = 1 + chunk * CHUNK
                if chunk < path.outward:
                    episode.watch(frames[start : start + CHUNK], path.actions[chunk])
                else:
                    episode.dream(path.actions[chunk])
                if folder is not None:
                    episode.save(folder)
                advance(float((episode.frames[-CHUNK:].cpu() - frames[start : start + CHUNK]).square().mean()))
        return episode.frames.cpu()


def measures(path: Path, frames: Tensor, past: int = CHUNK) -> dict[str, float]:
    """PSNR of the dreamed views, of their pixels that only a memory can know, and of the last one; consistency; cuts.

    The consistency is that of the last view with the first of the same place on this walk; NaN if it visits none twice.
    """
    truth, begin = path.frames, 1 + path.outward * CHUNK
    known = torch.cat([from_memory(path, start, past) for start in range(begin, len(truth), CHUNK)])
    same = (path.corners == path.corners[-1]).all(1).nonzero().flatten().tolist()
    return {
        "PSNR": psnr(frames[begin:], truth[begin:]),
        "PSNR from memory": psnr(frames[begin:], truth[begin:], known),
        "PSNR of the last view": psnr(frames[-1], truth[-1]),
        "consistency": consistency(frames[same[0]], frames[-1]) if len(same) > 1 else math.nan,
        "cuts": float(cuts(frames, path)),
    }
