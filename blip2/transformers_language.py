"""Any causal or sequence-to-sequence language model of the transformers library, for stage 2.

The library is optional: it is imported here and nowhere else, when --language-model names one of
its models. LibraryModel offers what the models of blip2/language.py offer, LibraryTokenizer what
texts.LanguageTokenizer asks for.
"""

import functools
import inspect
import math
from types import SimpleNamespace

from torch import Tensor, nn

from data.files import InputError


def library():
    """The transformers library. Raises InputError where it is not installed."""
    try:
        import transformers
    except ImportError:
        raise InputError("--language-model names a model of the transformers library, which is not "
                         "installed: `pip install transformers`, or train a small language model "
                         "with `python train.py language-model`")
    return transformers


def describe_library_model(name: str) -> dict:
    """Stage2Config.language for a name or folder of the library. Raises InputError."""
    transformers = library()
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(f"--language-model {name} is neither a checkpoint (.pt) of `python "
                         "train.py language-model` nor a model of the transformers library "
                         f"({str(error).splitlines()[0]})")
    return {"name": name, "kind": "encoder-decoder" if config.is_encoder_decoder else "decoder"}


class LibraryTokenizer:
    """The library's tokenizer of a model, as texts.LanguageTokenizer."""

    def __init__(self, name: str, kind: str):
        """kind: decoder or encoder-decoder. Raises InputError where the folder holds none."""
        try:
            t = self.tokenizer = library().AutoTokenizer.from_pretrained(name)
            readable = t.decode(t("a photo", add_special_tokens=False).input_ids)
        except (OSError, ValueError, TypeError):
            readable = ""
        if "a" not in readable:  # some versions return an empty tokenizer
            raise InputError(f"the language model {name} comes without a tokenizer; put its "
                             "tokenizer files into the folder")
        line_end = t("\n", add_special_tokens=False).input_ids
        # OPT: </s> starts a text, and a line's end closes it (released code). T5: </s> closes it.
        ends_with_line = kind == "decoder" and t.bos_token_id is not None and len(line_end) == 1
        self.pad = t.pad_token_id if t.pad_token_id is not None else t.eos_token_id
        self.bos = t.bos_token_id if t.bos_token_id is not None else self.pad
        self.eos = line_end[0] if ends_with_line else t.eos_token_id

    def ids(self, text: str) -> list[int]:
        """Text -> ids, without special tokens."""
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def decode(self, ids: list[int]) -> str:
        """Ids -> text, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()


@functools.cache
def open_library_tokenizer(name: str, kind: str = "decoder") -> LibraryTokenizer:
    """The tokenizer of a model, read once: an evaluation asks for it with every batch."""
    return LibraryTokenizer(name, kind)


class LibraryModel(nn.Module):
    """A language model of the library, frozen, behind the methods of language.LanguageModel.

    Where ours return states, it returns logits, and `logits` leaves them as they are. NOTE(differs
    from salesforce/LAVIS): a FlanT5 keeps its own activation, the tanh form of GELU.
    """

    beams_share = False  # its masks are (B, past + L): each beam has a cache of its own

    def __init__(self, language: dict):
        """language: of describe_library_model."""
        super().__init__()
        name, decoder = language["name"], language["kind"] == "decoder"
        kind = library().AutoModelForCausalLM if decoder else library().AutoModelForSeq2SeqLM
        try:
            # Not a submodule: its weights stay in their own files, not in our checkpoints.
            self.outside = [kind.from_pretrained(name).eval().requires_grad_(False)]
        except Exception as error:  # of files that are not whole each reader has its own kind
            raise InputError(f"the language model {name} cannot be read "
                             f"({str(error).partition(chr(10))[0]})")
        tokenizer = open_library_tokenizer(name, language["kind"])
        positions = getattr(self.model.config, "max_position_embeddings", math.inf)
        self.config = SimpleNamespace(kind=language["kind"], pad_id=tokenizer.pad,
                                      bos_id=tokenizer.bos, eos_id=tokenizer.eos,
                                      max_positions=positions)
        if not decoder:
            self.config.pad_id = self.model.config.decoder_start_token_id
        self.takes_positions = "position_ids" in inspect.signature(self.model.forward).parameters

    @property
    def model(self) -> nn.Module:
        """The library's model."""
        return self.outside[0]

    def _apply(self, function, recurse=True):
        self.model._apply(function)  # .to(device) moves it too
        return super()._apply(function, recurse)

    @property
    def width(self) -> int:
        """Of a word's embedding."""
        return self.model.get_input_embeddings().embedding_dim

    def embed(self, ids: Tensor) -> Tensor:
        """ids (B, L) -> (B, L, D)."""
        return self.model.get_input_embeddings()(ids)

    def logits(self, states: Tensor) -> Tensor:
        """They are logits already."""
        return states

    def select(self, past, rows: Tensor):
        """The cache of rows[0], rows[1] ..., repeats allowed."""
        past.reorder_cache(rows)
        return past

    # ---- a decoder ----

    def forward(self, embeds: Tensor, mask: Tensor, past=None) -> tuple[Tensor, object]:
        """embeds (B, L, D), mask (B, past + L) -> logits (B, L, V), the cache."""
        positions = {}
        if self.takes_positions:  # they count the attended tokens: padding in front moves nothing
            counted = (mask.long().cumsum(1) - 1).clamp(min=0)
            positions["position_ids"] = counted[:, -embeds.shape[1]:]
        out = self.model(inputs_embeds=embeds.to(self.model.dtype), attention_mask=mask.long(),
                         past_key_values=past, use_cache=True, **positions)
        return out.logits.float(), out.past_key_values

    # ---- an encoder-decoder ----

    def encode(self, embeds: Tensor, mask: Tensor) -> Tensor:
        """embeds (B, N, D), mask (B, N) -> states (B, N, D)."""
        encoder = self.model.get_encoder()
        return encoder(inputs_embeds=embeds.to(self.model.dtype),
                       attention_mask=mask.long()).last_hidden_state

    def project(self, states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """What `decode` looks at: the library projects it itself."""
        return states, mask

    def decode(self, ids: Tensor, context: tuple[Tensor, Tensor],
               past=None) -> tuple[Tensor, object]:
        """ids (n*B, L), context of B inputs -> logits (n*B, L, V), the cache."""
        copies = len(ids) // len(context[0])
        states, mask = (value.repeat_interleave(copies, 0) for value in context)
        out = self.model(encoder_outputs=(states,), attention_mask=mask.long(),
                         decoder_input_ids=ids, past_key_values=past, use_cache=True)
        return out.logits.float(), out.past_key_values
