"""BatchNorm's statistics of the images that a run trains on, in place of those that came with the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from quiltnet.distributed import gather_rows, rank
from quiltnet.errors import UserError
from quiltnet.training.engine import Callback, Pairs, TrainState

LEAST_IMAGES = 256  # over all ranks; below 2 * LEAST_IMAGES are taken


class AdaptBatchNorm(Callback):
    """Measures BatchNorm's statistics before the first step (``model.batchnorm=adapted``).

    A part of training, as ``PatchDropping`` is. Placed after ``Evaluate``, so the scores of the start are of the model
    as it was given. A resumed run has them from its checkpoint; one that is resumed before its first step measures the
    same ones again.

    Args:
        batches: a stream of this rank's batches on its device from the first on, apart from the one trained on.
    """

    def __init__(self, batches: Callable[[], Iterator[Pairs]]) -> None:
        self.batches = batches

    def fit_start(self, state: TrainState) -> None:  # all ranks
        if state.samples_seen:
            return
        adapt_statistics(state.unwrapped, first_images(self.batches(), state.global_batch_size))
        if state.average is not None:
            state.average.restart(state.unwrapped)
        state.model.train()


def check_adapting(model: nn.Module) -> None:
    """Refuse a ``ContrastiveModel`` without anything to measure.

    Raises:
        UserError: no BatchNorm in the image tower.
    """
    if not _norms(model):
        raise UserError(
            "model.batchnorm=adapted measures the statistics of BatchNorm, and the image tower has none; leave it out"
        )


def first_images(batches: Iterator[Pairs], global_batch_size: int) -> Tensor:
    """This rank's share of at least ``LEAST_IMAGES`` images, the same ones on however many ranks.

    Of smaller batches the first ones, whole; of a larger one every so many-th image, which fit where a step does.

    Returns:
        ``(B, 3, H, W)``, as the batches have them.
    """
    count = -(-LEAST_IMAGES // global_batch_size)
    stride = max(1, global_batch_size // LEAST_IMAGES)
    images = [next(batches).image for _ in range(count)]
    return torch.cat([image[-rank() * len(image) % stride :: stride] for image in images])


@torch.no_grad()
def adapt_statistics(model: nn.Module, image: Tensor) -> None:  # all ranks
    """Give each BatchNorm layer of the image tower the mean and variance of its inputs over all images (AdaBN).

    In one forward pass: a layer is measured on what those before it make with their new statistics. So the outcome is
    that of BatchNorm over one batch of the images of all ranks, does not depend on what the statistics were, and stays
    the same when it is done twice. Li et al. 2018, arXiv 1603.04779.

    Args:
        model: a ``ContrastiveModel``; in eval mode afterwards.
        image: ``(B, 3, H, W)`` of this rank, as ``encode_image`` takes them.
    """
    model.eval()
    hooks = [norm.register_forward_pre_hook(_take_statistics) for norm in _norms(model)]
    try:
        with torch.compiler.set_stance("force_eager"):  # compiled blocks do not look for hooks that came later
            model.encode_image(image)
    finally:
        for hook in hooks:
            hook.remove()


def _norms(model: nn.Module) -> list[_BatchNorm]:
    """Those of the image tower that normalise by stored statistics."""
    norms = [module for module in model.clip.visual.modules() if isinstance(module, _BatchNorm)]
    return [norm for norm in norms if norm.running_mean is not None]


def _take_statistics(norm: _BatchNorm, inputs: tuple[Tensor, ...]) -> None:  # all ranks
    """From each rank's mean and variance, those of all values together (Chan, Golub & LeVeque 1983)."""
    values = inputs[0].transpose(0, 1).flatten(1).float()  # (channels, values)
    variance, mean = torch.var_mean(values, dim=1, correction=0)
    counts = torch.full_like(mean, values.shape[1])
    counts, means, variances = gather_rows(torch.stack([counts, mean, variance])[None]).unbind(1)  # (W, channels) each
    shares = counts / counts.sum(0)
    mean = (shares * means).sum(0)
    norm.running_mean.copy_(mean)
    norm.running_var.copy_((shares * (variances + (means - mean) ** 2)).sum(0))
