"""From InferenceSettings to a running Engine: which checkpoint, on what device, in which number format."""

from model.build import requested_config, required_fields
from model.checkpoint import check_tokenizer, find_checkpoint, load_model, read_metadata
from model.device import select_device, select_dtype
from model.errors import UserError, tell
from model.inference.engine import Engine
from model.LMConfig import LMConfig
from model.stages import CHAT_STAGES
from model.tokenizer import load_tokenizer


def open_engine(settings, stages=CHAT_STAGES, **engine_arguments):
    """(Engine, path of its checkpoint) as InferenceSettings ask.

    Without a checkpoint in them the first of `stages` (names of model.stages) that has a file for the shape asked for.
    Raises UserError when there is none, when shape or tokenizer do not fit, or for a device that is not there.
    """
    device = select_device(settings.device)
    dtype = select_dtype(settings.dtype, device)
    fields = required_fields(settings)
    path = settings.checkpoint or find_checkpoint(settings.out_dir, stages, requested_config(settings), "--checkpoint")
    trained = read_metadata(path).get("config", {}).get("max_seq_len", LMConfig().max_seq_len)
    length = settings.max_seq_len or 0
    if settings.rope_scaling:
        if length <= trained:
            raise UserError(f"--rope_scaling needs a --max_seq_len above the trained {trained} tokens", exit_code=2)
        fields["rope_scaling"] = {"rope_type": settings.rope_scaling, "factor": length / trained}
    elif length > trained:
        tell(f"note: trained on {trained} tokens; beyond them answers get worse without --rope_scaling yarn")
    model, metadata = load_model(path, **fields)
    tokenizer = load_tokenizer(settings.tokenizer_path)
    check_tokenizer(tokenizer, path, model, metadata)
    return Engine(model.to(device, dtype), tokenizer, compile=settings.compile, **engine_arguments), path
