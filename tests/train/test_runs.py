"""A run's directory: held by one process, finished, extended, changed, overwritten, interrupted."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal

import jax
import pytest

from orthrus_jax.errors import UserError
from orthrus_jax.files import read_jsonl
from tests.support.training import miniature
from train import distill, lock, main, model_card, pretrain, recipe, trainer
from train.hosts import stop_on_signal
from train.log import Log
from train.recipe import Progress, progress


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    pretrain.main(miniature(folder), overwrite=False)
    return folder / "base"


def config_of(run, base, **train):
    config = miniature(run)
    config.base = str(base)
    config.train.update(eval_prompts=0, **train)
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory, base):
    run = tmp_path_factory.mktemp("run")
    main.main(config_of(run, base), overwrite=False)
    return run


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def weights(run):
    return (run / "model" / "model.safetensors").read_bytes()


def steps_of(run):
    """The steps that the view was trained for; the pairwise head's record is none."""
    records = [record for _, record in read_jsonl(run / "train.jsonl")]
    return [record["step"] for record in records if "loss" in record]


@pytest.fixture
def no_training(monkeypatch):
    """The loop stops at once, as if a signal had arrived."""

    def stop(*_, **__):
        raise trainer.Interrupted

    monkeypatch.setattr(trainer, "fit", stop)


def test_run_killed_before_its_last_file_is_finished_by_the_same_command(
    finished, copied, base, capsys
):
    for path in (copied / "train.json", copied / "model" / "README.md"):
        path.unlink()
    for name in (".model.0123abcd.tmp", ".model.0123abcd.old", ".rows.0123abcd.tmp"):
        (copied / name).mkdir()
    main.main(config_of(copied, base), overwrite=False)
    assert weights(copied) == weights(finished)
    assert json.loads((copied / "train.json").read_text())["trained_parameters"] > 0
    assert "training loss at step 8" in (copied / "model" / "README.md").read_text()
    assert sorted(p.name for p in copied.iterdir()) == sorted(p.name for p in finished.iterdir())
    capsys.readouterr()
    main.main(config_of(copied, base), overwrite=False)
    assert "is finished: its model was trained for 8 steps" in capsys.readouterr().out


def test_finished_run_is_extended_by_steps_and_then_is_finished(finished, copied, base, capsys):
    main.main(config_of(copied, base, steps=10), overwrite=False)
    assert "going on from step 8" in capsys.readouterr().out
    assert steps_of(copied)[-2:] == [9, 10]
    assert weights(copied) != weights(finished)
    assert progress(copied, config_of(copied, base, steps=10), change=False) is Progress.FINISHED
    with pytest.raises(UserError, match=r"begun with train\.steps=10, now 9"):
        main.main(config_of(copied, base, steps=9), overwrite=False)


def test_extended_run_that_is_interrupted_goes_on(copied, base, no_training):
    longer = config_of(copied, base, steps=10)
    main.main(longer, overwrite=False)
    assert not (copied / "train.json").exists()
    assert progress(copied, longer, change=False) is Progress.BEGUN
    main.main(longer, overwrite=False)


@pytest.mark.parametrize(
    "change",
    [
        {"accumulate": 2},
        {"log_every": 1, "save_every": 1, "eval_every": 1, "keep": 5},
        {"remat": "full"},
    ],
)
def test_what_computes_nothing_may_change(copied, base, change, capsys):
    config = config_of(copied, base, **change)
    config.distill.batch_size, config.pretrain.steps = 3, 99
    main.main(config, overwrite=False)
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change", [{"batch_size": 1}, {"row_length": 128}, {"learning_rate": 1.0}, {"seed": 3}]
)
def test_refused_change_leaves_the_recipe_and_the_old_command(copied, base, change, capsys):
    before = (copied / "recipe.json").read_bytes()
    with pytest.raises(UserError, match=f"begun with train.{next(iter(change))}="):
        main.main(config_of(copied, base, **change), overwrite=False)
    with pytest.raises(UserError, match=r"has 8 steps already; give more"):
        main.main(config_of(copied, base, **change), overwrite=False, change_recipe=True)
    assert (copied / "recipe.json").read_bytes() == before
    main.main(config_of(copied, base), overwrite=False)
    assert "is finished" in capsys.readouterr().out


def test_changed_rows_and_batches_go_on_from_the_same_weights(copied, base, capsys):
    changed = config_of(copied, base, batch_size=1, row_length=128, steps=10)
    main.main(changed, overwrite=False, change_recipe=True)
    printed = capsys.readouterr().out
    assert "the data begins anew" in printed
    assert "going on from step 8" in printed
    assert json.loads((copied / "recipe.json").read_text())["train.row_length"] == 128
    assert steps_of(copied)[-2:] == [9, 10]


@pytest.mark.parametrize("change", [{"train_o_proj": False}, {"stack_layers": True}])
def test_change_of_the_states_shapes_is_refused_by_name(copied, base, change):
    config = config_of(copied, base, steps=10, **change)
    with pytest.raises(UserError, match=f"trained with {next(iter(change))}="):
        main.main(config, overwrite=False, change_recipe=True)


def test_value_refused_late_is_in_no_recipe_and_can_be_corrected(
    finished, tmp_path, base, no_training
):
    config = config_of(tmp_path, base, batch_size=500)
    config.responses = str(finished / "responses")
    with pytest.raises(UserError, match="rows do not fill one batch of 500"):
        main.main(config, overwrite=False)
    assert not (tmp_path / "recipe.json").exists()
    config.train.update(batch_size=2, row_length=128)
    main.main(config, overwrite=False)
    assert json.loads((tmp_path / "recipe.json").read_text())["train.batch_size"] == 2


def test_overwritten_run_is_not_finished_and_goes_on_without_overwrite(
    copied, base, monkeypatch, no_training
):
    config = config_of(copied, base, anchors=5)
    with monkeypatch.context() as patch:
        patch.setattr(distill, "_answered", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            main.main(config, overwrite=True)
    left = {path.name for path in copied.iterdir()}
    assert left == {"responses", "model", "recipe.json"}
    main.main(config, overwrite=False)
    assert json.loads((copied / "recipe.json").read_text())["train.anchors"] == 5


def test_overwriting_keeps_the_responses_that_the_configuration_names(copied, base, no_training):
    config = config_of(copied, base)
    config.responses = str(copied / "responses")
    main.main(config, overwrite=True)
    assert (copied / "responses" / "manifest.json").exists()


def test_export_onto_its_own_base_is_refused(copied):
    with pytest.raises(UserError, match="is where the run exports to"):
        main.main(config_of(copied, copied / "model"), overwrite=True)
    assert weights(copied)


def test_held_out_prompts_that_leave_no_room_are_refused_at_the_start(tmp_path, base):
    config = config_of(tmp_path / "run", base)
    config.train.eval_prompts = 4
    config.distill.max_new_tokens = 2040
    with pytest.raises(UserError, match=r"of the 4 requested .*over 8 tokens"):
        main.main(config, overwrite=False)
    assert not (tmp_path / "run").exists()


def test_rows_of_texts_are_of_one_tokenizer(tmp_path, base, no_training):
    (tmp_path / "theirs.jsonl").write_text('{"prompt": "1 and 2?", "response": "3"}\n' * 99)
    other = shutil.copytree(base, tmp_path / "other")
    config = config_of(tmp_path / "run", base)
    config.responses = str(tmp_path / "theirs.jsonl")
    main.main(config, overwrite=False)
    (tmp_path / "run" / "checkpoints" / "3").mkdir()  # training has begun
    with (other / "tokenizer_config.json").open("a") as file:
        file.write("\n")
    config.base = str(other)
    written = json.loads((tmp_path / "run" / "recipe.json").read_text()) | {"base": str(other)}
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(written))
    with pytest.raises(UserError, match=r"rows of another recipe \(tokenizer "):
        main.main(config, overwrite=False)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"{", b"7", None])
def test_damaged_recipe_is_named_and_may_be_replaced(copied, base, content):
    (copied / "recipe.json").unlink()
    if content is not None:
        (copied / "recipe.json").write_bytes(content)
    with pytest.raises(UserError, match=r"recipe\.json, the recipe of .* cannot be read"):
        progress(copied, config_of(copied, base), change=False)
    assert progress(copied, config_of(copied, base), change=True) is Progress.BEGUN


def test_run_of_the_same_seed_does_not_depend_on_the_default_keys(finished, tmp_path, base):
    config = config_of(tmp_path, base)
    config.responses = str(finished / "responses")
    with jax.default_prng_impl("rbg"):
        main.main(config, overwrite=False)
    assert weights(tmp_path) == weights(finished)


def test_view_that_learned_nothing_gets_a_word(finished, tmp_path, base, capsys):
    config = config_of(tmp_path, base, steps=4, learning_rate=1e9)
    config.train.eval_prompts = 2
    config.responses = str(finished / "responses")
    main.main(config, overwrite=False)
    assert "warning: the view is hardly trained: 0.00 drafts" in capsys.readouterr().err
    assert "**the view is hardly trained" in (tmp_path / "model" / "README.md").read_text()
    assert model_card.warning({"acceptance_length": 1.2}) is None


def test_ctrl_c_saves_like_sigterm_and_ends_the_command(finished, tmp_path, base, capsys):
    config = config_of(tmp_path, base, save_every=100)
    config.responses = str(finished / "responses")
    write = Log.write

    def write_and_stop(log, record):
        write(log, record)
        if record["step"] == 4:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Log, "write", write_and_stop)
        with pytest.raises(KeyboardInterrupt):
            main.main(config, overwrite=False)
    streams = capsys.readouterr()
    assert "stopped and saved; the same command goes on" in streams.out
    assert "the same command goes on from what" in streams.err
    main.main(config, overwrite=False)
    assert "going on from step 5" in capsys.readouterr().out
    assert weights(tmp_path) == weights(finished)


def test_second_ctrl_c_does_not_wait_for_the_step(request):
    # A shell's background jobs, and so their tests, begin with this signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    def interrupt_twice():
        with stop_on_signal() as stop:
            assert not stop(1)
            os.kill(os.getpid(), signal.SIGINT)
            assert stop(2)
            os.kill(os.getpid(), signal.SIGINT)
            pytest.fail("the second one was ignored")

    with pytest.raises(KeyboardInterrupt):
        interrupt_twice()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_directory_is_held_by_one_process(tmp_path):
    run = tmp_path / "new" / "run"
    with lock.held(run):
        message = f"in use by process {os.getpid()} on .*: wait until it ends"
        with pytest.raises(UserError, match=message), lock.held(run):
            pytest.fail("held twice")
        assert (run / ".lock").exists()  # the refusal took nothing away
    assert not list(tmp_path.iterdir())  # nothing was written, so nothing is left
    with lock.held(run):
        (run / "model").mkdir()
    assert [path.name for path in run.iterdir()] == ["model"]


def test_lock_of_a_dead_process_is_no_obstacle(tmp_path):
    (tmp_path / ".lock").write_text("process 1 on elsewhere")
    with lock.held(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    assert not list(tmp_path.iterdir())


def test_lock_that_its_holder_removes_meanwhile_is_taken_anew(tmp_path, monkeypatch):
    flock, calls = fcntl.flock, []

    def removed_first(file, operation):
        if not calls:
            (tmp_path / ".lock").unlink()
        calls.append(file)
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    with lock.held(tmp_path):
        assert len(calls) == 2
        assert (tmp_path / ".lock").exists()


@pytest.mark.parametrize("where", ["", "file", "new/run"])
def test_directory_that_cannot_be_written_is_refused(tmp_path, where, monkeypatch):
    (tmp_path / "file").write_text("mine")
    if where != "file":
        full = OSError(errno.EROFS, "Read-only file system")
        monkeypatch.setattr(lock, "_lock", lambda run: (_ for _ in ()).throw(full))
    with (
        pytest.raises(UserError, match=f"--config.run={tmp_path / where} cannot be written"),
        lock.held(tmp_path / where),
    ):
        pytest.fail("held")


def _full(text="", number=errno.ENOSPC):
    return OSError(number, text or "No space left on device")


@pytest.mark.parametrize(
    "error",
    [
        _full(),
        _full("Quota", errno.EDQUOT),
        ValueError("RESOURCE_EXHAUSTED: Error writing x: No space left on device [OS error 28]"),
        ExceptionGroup("several", [_full()]),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_full_disk_is_one_line_that_says_how_to_go_on(tmp_path, error, wrapped):
    def work():
        if not wrapped:
            raise error
        raise RuntimeError("a checkpoint was not saved") from error

    goes_on = r"make room; the same command goes on"
    with pytest.raises(UserError, match=goes_on) as refusal, lock.held(tmp_path):
        work()
    assert "\n" not in str(refusal.value)


def test_other_errors_pass_unchanged(tmp_path):
    with pytest.raises(KeyError), lock.held(tmp_path):
        raise KeyError("a bug")
    with contextlib.suppress(FileNotFoundError):
        pytest.fail((tmp_path / ".lock").read_text())


def test_recipe_of_a_run_without_checkpoints_is_not_compared(tmp_path, base):
    (tmp_path / "recipe.json").write_text("{}")
    assert progress(tmp_path, config_of(tmp_path, base), change=False) is Progress.NEW


def test_finished_run_whose_checkpoints_are_gone_is_not_trained_anew(copied, base):
    shutil.rmtree(copied / "checkpoints")
    assert progress(copied, config_of(copied, base), change=False) is Progress.FINISHED
    with pytest.raises(UserError, match=r"begun with train\.steps=8, now 10: .*or --overwrite"):
        progress(copied, config_of(copied, base, steps=10), change=False)
    with pytest.raises(UserError, match="has no checkpoint to go on from"):
        progress(copied, config_of(copied, base, steps=10), change=True)
    assert recipe.read(copied / "recipe.json")["train.steps"] == 8
