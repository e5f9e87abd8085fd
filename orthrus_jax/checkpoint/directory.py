"""A checkpoint's directory: where it is, which files are read, how it is replaced as a whole.

Reads no pickle and runs no code of others. Knows no tensors and no settings.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import re
import shutil
import uuid
from collections.abc import Iterator
from typing import Any

from orthrus_jax.errors import UserError
from orthrus_jax.files import first_line
from orthrus_jax.values import check_type

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
TOKENIZER_FILE = re.compile(
    r"(tokenizer|tokenizer_config|vocab|special_tokens_map|added_tokens)\.json"
    r"|merges\.txt|chat_template\.jinja"
)


def resolve(source: str | pathlib.Path, revision: str | None = None) -> pathlib.Path:
    """Return the directory of a checkpoint: `source` itself, or the snapshot of a hub id.

    Of a hub repository only the top level's json, safetensors, txt and jinja files are fetched:
    no pickle, no Python.

    Args:
      source: a directory, or an id `owner/name` on the Hugging Face hub.
      revision: branch, tag or commit of a hub id.

    Raises:
      UserError: naming `source`, when it is neither, cannot be fetched, or is a directory and a
        revision was asked for.
    """
    check_type("source", source, (str, os.PathLike), "a directory or a hub id")
    if not str(source):
        raise UserError("the source is empty: give a checkpoint directory or a hub id")
    directory = pathlib.Path(source)
    if directory.is_dir():
        if revision is not None:
            raise UserError(f"{source} is a directory: a revision ({revision}) needs a hub id")
        return directory
    why = "no such directory"
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(source)):
        from huggingface_hub import snapshot_download  # late: most runs read a directory

        wanted = ["*.json", "*.safetensors", "*.txt", "*.jinja"]
        only: Any = {"allow_patterns": wanted, "ignore_patterns": ["*/*"]}
        try:
            return pathlib.Path(snapshot_download(str(source), revision=revision, **only))
        except Exception as error:  # offline, not found, gated, disk full: each has its own class
            why = f"not a directory here, and the hub says: {first_line(error)}"
    raise UserError(
        f"{source} cannot be loaded ({why}): give a checkpoint directory, or a hub id owner/name "
        "with network access (and HF_TOKEN where it is gated or private)"
    )


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Read a JSON object from `path`.

    Raises:
      UserError: when the file is missing, is not JSON, or holds something other than an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist: expected a Hugging Face checkpoint there"
        ) from None
    except (OSError, ValueError, RecursionError) as error:  # bad UTF-8 is a ValueError too
        raise UserError(f"{path} cannot be read as JSON: {first_line(error)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def weight_files(directory: pathlib.Path) -> list[str]:
    """Name the files with weights. Their headers list the tensors; an index may be wrong."""
    if (directory / SINGLE).exists():
        return [SINGLE]
    if (directory / INDEX).exists():
        claims = read_json(checked_path(directory, INDEX)).get("weight_map")
        if claims and isinstance(claims, dict) and {type(v) for v in claims.values()} == {str}:
            return sorted(set(claims.values()))
        raise UserError(f"{directory / INDEX} has no weight_map of tensor names to file names")
    pickles = any(directory.glob("pytorch_model*.bin"))
    hint = (
        "; its pytorch_model.bin is a pickle, which can run code, and is not read: convert it with "
        "transformers' AutoModelForCausalLM.from_pretrained(old).save_pretrained(new)"
    )
    raise UserError(f"{directory} holds no {SINGLE} nor {INDEX}{hint if pickles else ''}")


def checked_path(directory: pathlib.Path, name: str) -> pathlib.Path:
    """Return the path of file `name` of a checkpoint, refusing one that lies elsewhere.

    `name` may come from a downloaded index, so it must be a bare file name. A link may point within
    the directory or, in a hub cache (`repo/snapshots/commit/name -> ../../blobs/hash`), to the
    repository's own blobs; a link to anywhere else could pass off any file of this machine as part
    of the checkpoint.

    Raises:
      UserError: when the file lies elsewhere or does not exist.
    """
    if not re.fullmatch(r"\w[\w. -]{0,199}", name, re.ASCII):
        raise UserError(f"{directory} asks for the file {name!r}: expected a name without a folder")
    path, root = directory / name, directory.resolve()
    homes = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    target = pathlib.Path(os.path.realpath(path))  # Path.resolve raises on a loop of links
    if not any(target.is_relative_to(home) for home in homes):
        raise UserError(f"{path} is a link to {target}, outside its checkpoint: put a copy there")
    if not target.is_file():
        raise UserError(f"{path} does not exist or is no file: the checkpoint is incomplete")
    return path


def check_target(directory: str | pathlib.Path, *, overwrite: bool) -> None:
    """Refuse, before any work is done, a directory that `save_checkpoint` would refuse.

    Raises:
      UserError: when it is a file, holds anything and `overwrite` is not set, or holds something
        other than a checkpoint: overwriting deletes all of it.
    """
    check_type("directory", directory, (str, os.PathLike), "a path")
    target = pathlib.Path(directory)
    if target.exists() and not target.is_dir():
        raise UserError(f"{directory} is a file: expected a directory to write to")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{directory} is not empty: name another directory, or give --overwrite")
    if not (target / "config.json").exists():
        raise UserError(f"{directory} holds no checkpoint (no config.json): not overwritten")


@contextlib.contextmanager
def replacing(target: pathlib.Path, *, overwrite: bool) -> Iterator[pathlib.Path]:
    """Yield a fresh directory that takes the place of `target` if the block succeeds.

    What a killed process left beside the target is removed: a fresh directory is locked for as long
    as its writer lives.

    Args:
      target: without `overwrite` nothing or an empty directory, also when the block has ended: the
        system's own renaming refuses another, so of two writers one is kept whole.
      overwrite: take the place of whatever is there.

    Raises:
      UserError: when the system refuses, or another writer was first.
    """
    tag = uuid.uuid4().hex[:8]
    fresh, old = (target.with_name(f".{target.name}.{tag}.{kind}") for kind in ("tmp", "old"))
    lock = None
    try:
        _remove_abandoned(target)
        fresh.mkdir(parents=True)
        lock = _lock(fresh)
        yield fresh
        if overwrite and target.exists():
            target.rename(old)
        fresh.rename(target)
    except BaseException as error:  # Ctrl-C too must leave nothing behind
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(fresh, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"{target} could not be written: {error}; nothing was kept") from error
        raise
    finally:
        if lock is not None:
            os.close(lock)
    for abandoned in (old, *_beside(target, "old")):  # a kill between two renames leaves one
        shutil.rmtree(abandoned, ignore_errors=True)


def _beside(target: pathlib.Path, kind: str) -> list[pathlib.Path]:
    names = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.{kind}")
    parent = target.parent
    return [p for p in parent.iterdir() if names.fullmatch(p.name)] if parent.is_dir() else []


def _remove_abandoned(target: pathlib.Path) -> None:
    for fresh in _beside(target, "tmp"):
        if (lock := _lock(fresh)) is not None:
            shutil.rmtree(fresh, ignore_errors=True)
            os.close(lock)


def _lock(directory: pathlib.Path) -> int | None:
    """Lock a directory for this process, which ends with it; None where another one has it."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:  # removed meanwhile
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
