"""The paper's other tasks: each a small head on the parts that were pretrained.

    VQA       question encoder (grounded in the image) and answer decoder that reads its states
              (BLIP sec. 5.3, Fig. 5a)
    NLVR2     a statement about two images: two cross-attentions a layer, merged (sec. 5.4, Fig. 5b)
    VisDial   history, question and candidate answer judged against image and caption (sec. 5.5,
              Fig. 5c)

Each model's forward returns ({task: loss}, {}) for the training loop; nothing in it changes.
`pretrained_name` says where a parameter comes from in a pretrained BLIP; what has no place there
starts fresh. Letters as in blip.py; A answers, K candidates.
"""

import re

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import losses as L
from blip import BLIP, BLIPConfig, CaptionStep, init_weights, make_med, make_vit
from decoding import beam_search
from med import ImageKV


class TaskModel(nn.Module):
    """What the training loop asks of every model: here one objective and no momentum twins."""

    def __init__(self, config: BLIPConfig):
        super().__init__()
        self.config = config
        self.vit = make_vit(config)

    def twins(self) -> list:
        """None."""
        return []

    def set_objectives(self, objectives: tuple[str, ...]) -> None:
        """There is one, and it reaches every parameter."""

    def pretrained_name(self, name: str) -> str:
        """Parameter -> the one of a pretrained BLIP that it starts from."""
        return name


class VQA(TaskModel):
    """vit, question (a MED that reads the image), answer (a MED that reads the question's
    states). The two MEDs share nothing: each starts from the pretrained one."""

    def __init__(self, config: BLIPConfig):
        super().__init__(config)
        self.question = make_med(config, ("grounded",))
        self.answer = make_med(config, ("decode",), context_width=config.text_width)
        self.apply(init_weights)

    def pretrained_name(self, name: str) -> str:
        """question.* and answer.* both come from med.*"""
        return name.replace("question.", "med.", 1).replace("answer.", "med.", 1)

    def read(self, image: Tensor, ids: Tensor, mask: Tensor,
             attend_padding: bool = False) -> ImageKV:
        """image (B, 3, S, S) or (B, F, 3, S, S): frames, questions ids and mask (B, L) -> keys and
        values of the questions' states for the answer decoder, projected once for all answers.

        NOTE(differs from salesforce/BLIP): answers do not look at the padding behind a question,
        as they do there in generation; `attend_padding` reproduces that.
        """
        frames = image.flatten(0, 1) if image.ndim == 5 else image
        tokens = self.vit(frames).reshape(len(image), -1, self.config.vit_width)
        states = self.question.encode_grounded(ids, mask, self.question.project(tokens))
        return self.answer.project(states, None if attend_padding else mask)

    def answer_nll(self, kv: ImageKV, ids: Tensor, mask: Tensor,
                   label_smoothing: float = 0.0) -> Tensor:
        """kv of B questions, answers ids and mask (n*B, L) -> (n*B,): negative log-likelihood,
        summed over tokens. The LM head runs only where there is a target."""
        states, _ = self.answer.decode(ids[:, :-1], mask[:, :-1], kv)
        targets = L.next_token_targets(ids, mask)
        rows, columns = (targets >= 0).nonzero(as_tuple=True)
        logits = self.answer.logits(states[rows, columns])
        return L.text_nll(logits, targets[rows, columns], rows, len(ids), label_smoothing)

    def forward(self, image: Tensor, ids: Tensor, mask: Tensor, answer_ids: Tensor,
                answer_mask: Tensor, counts: Tensor, weights: Tensor) -> tuple[dict, dict]:
        """Questions ids and mask (B, L); answers (A, La), counts (B,) of them for each question in
        turn, weights (A,): the share of people who gave it -> weighted LM loss a question."""
        rows = torch.arange(len(ids), device=ids.device).repeat_interleave(counts)
        kv = self.read(image, ids, mask).select(rows)
        nll = self.answer_nll(kv, answer_ids, answer_mask, self.config.label_smoothing)
        return {"vqa": (weights * nll).sum() / len(ids)}, {}

    @torch.no_grad()
    def rank(self, kv: ImageKV, ids: Tensor, mask: Tensor, top_k: int = 128,
             label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        """kv of B questions, the answer list ids and mask (A, L) -> candidates (B, K): the answers
        whose first token is likeliest, and their negative log-likelihoods (B, K).

        NOTE(differs from salesforce/BLIP): likelihoods are not label-smoothed; `label_smoothing`
        0.1 reproduces that.
        """
        batch = len(kv.dec[0][0])
        start = torch.full((batch, 1), self.config.dec_id, device=ids.device)
        states, _ = self.answer.decode(start, None, kv)
        first = self.answer.logits(states[:, 0]).float().softmax(-1)[:, ids[:, 1]]  # (B, A)
        chosen = first.topk(min(top_k, len(ids)), dim=1).indices
        flat = chosen.flatten()
        longest = int(mask[flat].sum(1).max())
        nll = self.answer_nll(kv, ids[flat, :longest], mask[flat, :longest], label_smoothing)
        return chosen, nll.view(chosen.shape)

    @torch.no_grad()
    def generate(self, kv: ImageKV, beams: int = 3, max_length: int = 10,
                 min_length: int = 1) -> list[tuple[list[int], float]]:
        """kv of B questions -> for each its likeliest answer (token ids, mean log-probability).
        Lengths count [DEC]."""
        device = kv.dec[0][0].device
        questions = torch.arange(len(kv.dec[0][0]), device=device)
        start = torch.full((len(questions), 1), self.config.dec_id, device=device)
        found = beam_search(CaptionStep(self.answer, kv, questions), start, self.config.sep_id,
                            beams, max_length, min_length)
        return [(ids[1:], score) for (ids, score), *_ in found]


class NLVR2(TaskModel):
    """vit, med (its cross-attention is two: one for each image), head. In the lower half of the
    layers what is seen in the two images is averaged, in the upper half merged."""

    def __init__(self, config: BLIPConfig, merge_from: int | None = None):
        """merge_from: the first layer that merges; None: half of the depth, 6 at base size."""
        super().__init__(config)
        if merge_from is None:
            merge_from = config.text_depth // 2
        self.med = make_med(config, ("grounded",), merge_from=merge_from)
        width = config.text_width
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))
        self.apply(init_weights)

    def pretrained_name(self, name: str) -> str:
        """Both cross-attentions come from the one."""
        return name.replace("twins.0.", "").replace("twins.1.", "")

    def logits(self, image: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """image (B, 2, 3, S, S), statements ids and mask (B, L) -> (B, 2); class 1 = true."""
        tokens = self.vit(image.flatten(0, 1))
        kv = self.med.project(tokens.unflatten(0, image.shape[:2]))
        return self.head(self.med.encode_grounded(ids, mask, kv, first_only=True)[:, 0])

    def forward(self, image: Tensor, ids: Tensor, mask: Tensor,
                label: Tensor) -> tuple[dict, dict]:
        """label (B,) 0 or 1 -> cross-entropy."""
        return {"nlvr2": F.cross_entropy(self.logits(image, ids, mask), label)}, {}


class VisDial(TaskModel):
    """vit, med (unimodal for the caption, grounded for the dialog), head. What the dialog encoder
    looks at is the image's tokens and behind them the caption's states."""

    def __init__(self, config: BLIPConfig):
        super().__init__(config)
        if config.vit_width != config.text_width:
            raise ValueError("visual dialog puts image tokens and caption states side by side: "
                             f"vit_width {config.vit_width} and text_width {config.text_width} "
                             "must be equal")
        self.med = make_med(config, ("text", "grounded"))
        self.head = nn.Linear(config.text_width, 2)
        self.apply(init_weights)

    def pretrained_name(self, name: str) -> str:
        """The head comes from ITM's."""
        return name.replace("head.", "itm_head.") if name.startswith("head.") else name

    def read(self, image: Tensor, caption_ids: Tensor, caption_mask: Tensor) -> ImageKV:
        """image (B, 3, S, S), captions ids and mask (B, Lc) -> keys and values of both, projected
        once for all rounds and candidates of a dialog; a caption's padding is masked."""
        tokens = self.vit(image)
        states = self.med.encode_text(caption_ids, caption_mask)
        mask = torch.cat([caption_mask.new_ones(tokens.shape[:2]), caption_mask], 1)
        return self.med.project(torch.cat([tokens, states], 1), mask)

    def logits(self, kv: ImageKV, ids: Tensor, mask: Tensor) -> Tensor:
        """kv of B dialogs, history + question + candidate ids and mask (n*B, L) -> (n*B, 2); class
        1 = the answer. Text i belongs to dialog i // n."""
        return self.head(self.med.encode_grounded(ids, mask, kv, first_only=True)[:, 0])

    def forward(self, image: Tensor, caption_ids: Tensor, caption_mask: Tensor, ids: Tensor,
                mask: Tensor, label: Tensor) -> tuple[dict, dict]:
        """n candidates for each of B rounds: ids and mask (n*B, L), label (n*B,) -> cross-entropy,
        as ITM's."""
        kv = self.read(image, caption_ids, caption_mask)
        return {"visdial": F.cross_entropy(self.logits(kv, ids, mask), label)}, {}


MODELS = {"vqa": VQA, "nlvr2": NLVR2, "visdial": VisDial}


def make_model(task: str, config: BLIPConfig, weights: dict | None = None) -> nn.Module:
    """The model of a task; BLIP itself for pretraining, retrieval and captions. `weights`: a state
    dict that it is to hold, with our names or the released ones."""
    if task == "nlvr2" and weights:
        merging = [int(re.search(r"layers?\.(\d+)\.", name)[1]) for name in weights
                   if re.search(r"\.merge(_layer)?\.weight$", name)]
        return NLVR2(config, min(merging, default=config.text_depth))
    return MODELS.get(task, BLIP)(config)
