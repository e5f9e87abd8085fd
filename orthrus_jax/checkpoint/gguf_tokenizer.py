"""The tokenizer that a GGUF file describes, with its chat template, as transformers keeps one.

Decides which vocabularies are read: byte-level BPE split as a known model splits text, and
sentencepiece BPE. Knows no tensors.
"""

from typing import Any

from orthrus_jax.checkpoint.gguf_file import GgufFile
from orthrus_jax.errors import UserError
from orthrus_jax.tokenizer import Tokenizer

CONTROL, USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS: dict[str, tuple[str, ...]] = {  # tokenizer.ggml.pre -> patterns, one after the other
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_WORDS % "{1,3}",),
    "qwen2": (_WORDS % "",),
    "deepseek-r1-qwen": (_WORDS % "",),
    "tekken": (_TEKKEN,),
}
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}


def gguf_tokenizer(file: GgufFile) -> Tokenizer:
    """Build a file's tokenizer.

    Raises:
      UserError: naming the file, when it describes none, a damaged one, or one of a kind that is
        not read.
    """
    ggml = {
        key.removeprefix("tokenizer.ggml."): value
        for key, value in file.metadata.items()
        if key.startswith("tokenizer.ggml.")
    }
    try:
        core = _core(ggml)
        roles = {
            f"{role}_token": ggml["tokens"][ggml[f"{name}_token_id"]]
            for role, name in ROLES.items()
            if f"{name}_token_id" in ggml
        }
        return _wrapped(core, roles, file.metadata.get("tokenizer.chat_template"))
    except UserError as error:
        raise UserError(f"{file.path}: {error}") from None
    except Exception as error:  # a damaged vocabulary makes the library raise anything
        cause = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{file.path}: the tokenizer is damaged or incomplete ({type(error).__name__}: {cause})"
        ) from None


def _wrapped(core: Any, roles: dict[str, str], template: str | None) -> Tokenizer:
    from transformers import PreTrainedTokenizerFast  # late: it takes seconds

    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        chat_template=template,
        clean_up_tokenization_spaces=False,
        **roles,
    )


def _core(ggml: dict[str, Any]) -> Any:
    from tokenizers import AddedToken

    kind = ggml.get("model")
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if kind not in builders:
        raise UserError(f"tokenizer.ggml.model={kind!r} is not one of {', '.join(builders)}")
    core = builders[kind](ggml)
    tokens, kinds = ggml["tokens"], ggml.get("token_type", [])
    for special, number in ((True, CONTROL), (False, USER_DEFINED)):
        own = [t for t, k in zip(tokens, kinds, strict=False) if k == number]
        added = [AddedToken(token, normalized=False, special=special) for token in own]
        (core.add_special_tokens if special else core.add_tokens)(added)
    begins = kind == "llama" or ggml.get("pre") == "llama-bpe"  # where the file does not say
    if ggml.get("add_bos_token", begins):
        _begin_with(core, tokens[ggml["bos_token_id"]], ggml["bos_token_id"])
    return core


def _begin_with(core: Any, token: str, number: int) -> None:
    from tokenizers import processors

    begin = processors.TemplateProcessing(
        single=[token, "$A"], pair=[token, "$A", token, "$B"], special_tokens=[(token, number)]
    )
    own = [core.post_processor] if core.post_processor is not None else []
    core.post_processor = processors.Sequence([*own, begin])


def _byte_level(ggml: dict[str, Any]) -> Any:
    """BPE over bytes; `pre` names how text is split before."""
    from tokenizers import (
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    pre = ggml.get("pre")
    if pre not in SPLITS:
        raise UserError(f"tokenizer.ggml.pre={pre!r} is not one of {', '.join(SPLITS)}")
    merges = [tuple(merge.split(" ")) for merge in ggml["merges"]]
    whole = pre in ("llama-bpe", "tekken")  # a word of the vocabulary is not merged from its parts
    core = Tokenizer(models.BPE(_vocabulary(ggml), merges, ignore_merges=whole))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS[pre]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    if "qwen" in pre:
        core.normalizer = normalizers.NFC()
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    return core


def _sentencepiece(ggml: dict[str, Any]) -> Any:
    """BPE over characters with a space's mark, bytes for unknown ones; scores order the merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary, unknown = _vocabulary(ggml), ggml["tokens"][ggml.get("unknown_token_id", 0)]
    merges = _merges(vocabulary, ggml["scores"])
    core = Tokenizer(
        models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = bool(ggml.get("add_space_prefix", True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(
        prepend_scheme="first" if prefix else "never", split=False
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    return core


def _vocabulary(ggml: dict[str, Any]) -> dict[str, int]:
    vocabulary = {token: i for i, token in enumerate(ggml["tokens"])}
    if len(vocabulary) != len(ggml["tokens"]):
        raise UserError("tokenizer.ggml.tokens holds a token twice")
    return vocabulary


def _merges(vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Pairs of tokens whose joint text is a token, the best first."""
    pairs = []
    for token, i in vocabulary.items():
        halves = [(token[:at], token[at:]) for at in range(1, len(token))]
        known = [pair for pair in halves if pair[0] in vocabulary and pair[1] in vocabulary]
        known.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        pairs += [(-scores[i], i, *pair) for pair in known]
    pairs.sort(key=lambda pair: pair[:2])
    return [pair[2:] for pair in pairs]
