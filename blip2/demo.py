"""What a person asks of a BLIP-2: several questions about a picture, what each query looks at."""

import torch
import torch.nn.functional as F
from torch import Tensor

from blip2.stage1 import FrozenVision
from blip2.task_stage2 import answer
from data.images import prepare_images
from data.text import clean_question
from tasks.task import TrainedModel


def chat(trained: TrainedModel, image: Tensor, questions: list[str]) -> list[tuple[str, str]]:
    """Questions about a picture (3, S, S) uint8, answered in the light of those before.

    (BLIP-2 sec. 4.1, Fig. 4.) Raises InputError where a dialog gets too long.
    """
    images = prepare_images(image[None], trained.device)
    dialog = []
    for question in map(clean_question, questions):
        said = answer(trained, images, [question], [dialog], min_length=2)[0]  # one word at least
        dialog.append((question, said))
    return dialog


def effective_rank(states: Tensor) -> float:
    """In how many directions the queries of a picture differ: 1 to Q - 1.

    states (Q, D). The exponential of the entropy of the squared singular values, each divided by
    their sum, once the queries' mean is taken off: as Roy and Vetterli 2007, but of the covariance.
    """
    power = torch.linalg.svdvals((states - states.mean(0)).float()).square()
    share = power / power.sum().clamp(min=1e-30)
    return torch.special.entr(share).sum().exp().item()


@torch.no_grad()
def query_attention(trained: TrainedModel, image: Tensor) -> tuple[list[str], Tensor, float]:
    """Where each query looks in a picture, and how much the queries differ.

    image (3, S, S) uint8 -> names (Q), maps (Q, S, S) in [0, 1], effective_rank. A map is the
    cross-attention of the last layer that has one, averaged over heads, without [CLS]; each is
    stretched to its own largest value.
    """
    model: FrozenVision = trained.model.eval()
    tokens = model.encode_tokens(prepare_images(image[None], trained.device))
    attn_maps = []
    states, _ = model.qformer.encode_queries(model.qformer.project(tokens), attn_maps)
    patches = attn_maps[-1][0].mean(0)[:, 1:]  # (Q, N)
    grid = model.config.image_size // model.config.patch_size
    heat = F.interpolate(patches.view(1, -1, grid, grid), size=image.shape[1:],
                         mode="bilinear")[0]
    names = [f"query {number + 1}" for number in range(len(heat))]
    heat = (heat / heat.amax((1, 2), keepdim=True).clamp(min=1e-12)).cpu()
    return names, heat, effective_rank(states[0])
