"""From settings to a model or a running Engine: which checkpoint, on what device, in which number format."""

import contextlib
import dataclasses
import shlex
from pathlib import Path

from model.build import SHAPE_FIELDS, explicit_fields, requested_config, required_fields
from model.checkpoint import check_tokenizer, file_sha256, find_checkpoint, load_model, read_metadata
from model.device import check_int8, select_device, select_dtype
from model.errors import UserError, tell
from model.inference.engine import Engine
from model.LMConfig import LMConfig
from model.lora import check_base, merge, named, read_adapter
from model.stages import CHAT_STAGES, PRETRAINED_STAGES
from model.tokenizer import load_tokenizer


def open_engine(settings, stages=CHAT_STAGES, **engine_arguments):
    """(Engine, what it runs: path of the checkpoint, and of the adapter on it) as InferenceSettings ask. Raises UserError as
    open_model does, and for a context that memory cannot hold."""
    int8 = settings.dtype == "int8"
    if int8:
        check_int8(select_device(settings.device))
        settings = dataclasses.replace(settings, dtype="bfloat16")
    model, tokenizer, path, metadata = open_model(settings, stages)
    if metadata.get("stage") in PRETRAINED_STAGES and metadata["stage"] not in stages:
        command = shlex.join(["python", "0-eval_pretrain.py", "--checkpoint", str(path)])
        tell(f"note: {path} is only pretrained: it goes on writing, it does not answer; to see that: {command}")
    engine = Engine(model, tokenizer, compile=settings.compile, int8=int8, **engine_arguments)
    return engine, named(path, settings.lora)


def open_engine_with_adapters(settings, adapters, **engine_arguments):
    """open_engine, with the LoRA adapters {name: file} for requests that ask for one; where `settings` name no checkpoint,
    on the base of the first one. Raises UserError also where an adapter does not fit."""
    adapters = {name: read_adapter(file) for name, file in adapters.items()}
    base = settings.checkpoint or adapter_base(next(iter(adapters.values()), None))
    engine, path = open_engine(dataclasses.replace(settings, checkpoint=base), **engine_arguments)
    for name, adapter in adapters.items():
        check_base(adapter, path, settings.force)
        engine.add_adapter(name, adapter)
    return engine, path


def open_model(settings, stages=CHAT_STAGES):
    """(Transformer, tokenizer, path, metadata of its .json or {}) as MachineSettings ask, on their device and in their
    dtype; as CheckpointSettings ask, which name neither, in float32 on the CPU. With an adapter in them it is merged, and
    the metadata are the adapter's.

    Without a checkpoint in them the one that latest_checkpoint finds for `stages`, or the adapter's base. Raises UserError
    when there is none, when shape, tokenizer or adapter do not fit, and for a device that is not there.
    """
    device = select_device(getattr(settings, "device", "cpu"))
    dtype = select_dtype(getattr(settings, "dtype", "float32"), device)
    fields = required_fields(settings)
    adapter = read_adapter(settings.lora) if settings.lora else None
    path = settings.checkpoint or adapter_base(adapter) or latest_checkpoint(settings, stages)
    known = LMConfig(**read_metadata(path).get("config", {}))
    trained, length = known.max_seq_len, settings.max_seq_len or 0
    if settings.rope_scaling:
        if length <= trained:
            raise UserError(f"--rope_scaling needs a --max_seq_len above the trained {trained} tokens", exit_code=2)
        fields["rope_scaling"] = {"rope_type": settings.rope_scaling, "factor": length / known.trained_length}
    elif length > trained:
        tell(f"note: trained on {trained} tokens; beyond them answers get worse without --rope_scaling yarn")
    model, metadata = load_model(path, **fields)
    tokenizer = load_tokenizer(settings.tokenizer_path, path)
    check_tokenizer(tokenizer, path, model, metadata)
    if adapter:
        check_base(adapter, path, settings.force)
        merge(model, adapter)
        metadata = adapter.metadata
    return model.to(device, dtype), tokenizer, path, metadata


def adapter_base(adapter):
    """The file that an Adapter was trained on, where it still lies there; None without an adapter or its base."""
    file = adapter and adapter.metadata["parent"].get("file")
    return file if file and Path(file).exists() else None


def latest_checkpoint(settings, stages):
    """The first of `stages` (names of model.stages) that has a checkpoint of the shape asked for in settings.out_dir.

    When no shape is asked for, the newest of another shape will do, and then what quickstart.py wrote. Raises UserError.
    """
    try:
        return find_checkpoint(settings.out_dir, stages, requested_config(settings), "--checkpoint")
    except UserError:
        if settings.preset or any(name in SHAPE_FIELDS for name in explicit_fields(settings)):
            raise
        for folder in (Path(settings.out_dir), Path(settings.out_dir, "quickstart")):
            for stage in stages:
                if found := stage_checkpoints(folder, stage):
                    return found[0]
        raise


def stage_checkpoints(folder, stage):
    """Paths of the checkpoints of a stage, of whatever shape, in `folder`, the newest first."""
    found = [path for path in Path(folder).glob(f"{stage}_*.pth") if path.with_suffix("").suffix != ".resume"]
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def all_checkpoints(out_dir):
    """Paths of the whole models in `out_dir` and in what quickstart.py wrote there, the best to talk to first: of each
    folder the chat stages, the last one first, and behind them all what is only pretrained."""
    folders = (Path(out_dir), Path(out_dir, "quickstart"))
    return [
        path
        for stages in (CHAT_STAGES, PRETRAINED_STAGES)
        for folder in folders
        for stage in stages
        for path in stage_checkpoints(folder, stage)
    ]


def fitting_adapters(out_dir, checkpoint):
    """Paths of the LoRA adapters beside those checkpoints that say they were trained on the weights in `checkpoint`."""
    own, found = None, []
    for folder in (Path(out_dir), Path(out_dir, "quickstart")):
        for path in stage_checkpoints(folder, "lora"):
            with contextlib.suppress(UserError):  # a broken description is no offer
                base = read_metadata(path).get("parent")
                own = own or recorded_sha256(checkpoint)
                if isinstance(base, dict) and base.get("sha256") == own:
                    found.append(path)
    return found


def recorded_sha256(checkpoint):
    """sha256 of a checkpoint's weights, as its .json says, which is quicker than to read them."""
    return read_metadata(checkpoint).get("weights_sha256") or file_sha256(checkpoint)
