"""One training step of tower, projector and decoder together; on a GPU it is recorded once and then replayed."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlavaForConditionalGeneration

from tools.teacher.batches import IGNORE, Batch, Packer
from tools.teacher.network import DenseHeads, answer_logits, patch_features, tower_of
from tools.teacher.optimise import Optimiser

DENSE_UNTIL = 0.6
"""The fraction of the time after which the dense labels are no longer used; their weight falls linearly until then."""
PLAIN_STEPS = 11
"""Steps before the recording."""


class Trainer:
    """Trains a teacher.

    The step has some thousand small kernels, and starting them takes longer than they run; a recording (a CUDA graph)
    starts them all at once.

    Args:
        model: The teacher, changed in place.
        packer: Made the batches.
        rate: Peak learning rate.
        compiled: Compile the layers.
    """

    def __init__(self, model: LlavaForConditionalGeneration, packer: Packer, rate: float, compiled: bool) -> None:
        self._model, self._device = model, next(model.parameters()).device
        self._projects = packer.subject.after_projector
        read = model.config.text_config if self._projects else model.config.vision_config
        self._heads = DenseHeads(packer.subject, read.hidden_size).to(self._device)
        self._kinds = packer.subject.kinds
        self._before = packer.before.to(self._device)
        self._dense_weight = torch.tensor(0.0, device=self._device)
        tower, language = tower_of(model), model.model.language_model
        layers: list[nn.Module] = [tower.encoder.layers, language.layers]
        others = [each for name, each in tower.named_children() if name in ("embeddings", "pre_layrnorm")]
        others += [model.model.multi_modal_projector, self._heads]
        self._optimiser = Optimiser(layers, [*others, language.embed_tokens, language.norm, model.lm_head], rate)
        self._steps = 0
        self._recording: torch.cuda.CUDAGraph | None = None
        if compiled:
            torch._dynamo.config.cache_size_limit = 64
            for layer in (*tower.encoder.layers, *language.layers):
                layer.compile(dynamic=False)

    def step(self, batch: Batch, done: float) -> None:
        """Learn from a batch; ``done`` is the fraction of the time that has gone."""
        self._optimiser.schedule(done)
        self._dense_weight.fill_(max(0.0, 1 - done / DENSE_UNTIL))
        self._steps += 1
        if self._device.type != "cuda":
            self._batch, self._found = batch, self._step(batch)
        elif self._recording is None:
            self._record(batch)
        else:
            for mine, new in zip(vars(self._batch).values(), vars(batch).values(), strict=True):
                mine.copy_(new, non_blocking=True)
            self._recording.replay()

    def _record(self, batch: Batch) -> None:
        """Make a plain step; after some of them, record one."""
        self._batch = batch.to(self._device)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._found = self._step(self._batch)
        torch.cuda.current_stream().wait_stream(side)
        if self._steps >= PLAIN_STEPS:
            torch.cuda.synchronize()
            recording = torch.cuda.CUDAGraph()
            with torch.cuda.graph(recording, capture_error_mode="thread_local"):  # others may pin memory meanwhile
                self._found = self._step(self._batch)
            self._recording = recording

    def _step(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(self._device.type, torch.bfloat16):
            features = patch_features(self._model, batch.pixels)
            labelled = self._model.model.multi_modal_projector(features) if self._projects else features
            dense = self._heads.loss(labelled, batch.patches.long())
            logits = answer_logits(self._model, self._before, features, batch)
        answer = cross_entropy(logits, batch.answers, ignore_index=IGNORE)
        (answer + self._dense_weight * dense).backward()
        self._optimiser.step()
        return dense.detach(), answer.detach(), logits.detach()

    def report(self) -> dict[str, float]:
        """Return the step's number and losses, and the accuracy of its answer tokens per kind."""
        dense, answer, logits = self._found
        right = (logits.argmax(-1) == self._batch.answers).float()
        shares = {kind: right[self._batch.kinds == i] for i, kind in enumerate(self._kinds)}
        by_kind = {kind: share.mean().item() for kind, share in shares.items() if len(share)}
        return {"step": self._steps, "dense": dense.item(), "answer": answer.item(), **by_kind}
