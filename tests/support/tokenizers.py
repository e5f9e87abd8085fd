"""Small trained tokenizers. The one place where tests of the library reach for `train`."""

from orthrus_jax.tokenizer import Tokenizer


def small_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` - 1 ids, ChatML as its template."""
    from train.pretrain import train_tokenizer

    return train_tokenizer(texts, vocab_size)
