"""One export, whatever its format: what may be written where, and writing it."""

from pathlib import Path

from model.checkpoint import resume_path, save_checkpoint
from model.device import DTYPES
from model.errors import UserError
from model.export.gguf import write_gguf
from model.export.huggingface import FILES, write_folder
from model.files import refuse_existing, refuse_foreign
from model.tokenizer import tokenizer_hash, turn_frames

SUFFIXES = {"gguf": ".gguf", "pth": ".pth"}  # of the formats that are files; the others are folders


def default_output(settings, path):
    """out/export/<checkpoint>_<format>, with the suffix that the format has; a gguf in a folder of its own."""
    name = f"{Path(path).stem}_{settings.format}"
    if settings.format == "gguf":
        return Path("out/export", name, f"{Path(path).stem}_{settings.quantization or 'q8_0'}.gguf")
    return Path("out/export", name + SUFFIXES.get(settings.format, ""))


def modelfile_path(output):
    """Where the Ollama Modelfile of the GGUF `output` goes: "Modelfile", or <name>.Modelfile where another GGUF has that."""
    path, others = output.with_name("Modelfile"), output.with_suffix(".Modelfile")
    if not path.exists():
        return path
    own = path.is_file() and path.read_bytes().startswith(f"FROM ./{output.name}\n".encode())
    return path if own else others


def files_of(format, output):
    """The files that a format writes to `output`, or its one folder."""
    if format == "gguf":
        return [output, modelfile_path(output)]
    return [output, output.with_suffix(".json")] if format == "pth" else [output]


def check_output(settings, output):
    """Raise UserError for a name that does not fit the format, and for what would be replaced without settings.force."""
    suffix = SUFFIXES.get(settings.format)
    if suffix and (output.suffix != suffix or output.suffixes[-2:] == [".resume", ".pth"]):
        raise UserError(f"--output {output}: a {settings.format} is a file whose name ends in {suffix}", exit_code=2)
    refuse_existing(files_of(settings.format, output), settings.force, "--force")
    if suffix is None:
        refuse_foreign(output, FILES)
    elif output.is_dir():
        raise UserError(f"--output {output}: is a folder; choose another name")
    elif settings.format == "pth" and resume_path(output).exists():
        reason = f"{resume_path(output).name} is there, and --resume would put its weights in the place of these"
        raise UserError(f"--output {output}: {reason}; choose another name")


def write_export(settings, output, model, tokenizer, path, card):
    """Write `model` as the ExportSettings say; returns the folder or files. path: what it came from, for the .json.

    Raises UserError as write_folder and write_gguf do, and OSError for a full disk; then nothing is left.
    """
    written = files_of(settings.format, output)
    if settings.format == "gguf":
        beside = {written[1]: modelfile(output.name, tokenizer, model.config)}
        write_gguf(output, model, tokenizer, settings.quantization or "q8_0", card.name, card.licence, beside)
    elif settings.format == "pth":
        weights = {name: tensor.to(DTYPES[settings.dtype or "float32"]) for name, tensor in model.state_dict().items()}
        weights["output.weight"] = weights["tok_embeddings.weight"]  # one tensor in the file too
        parent = {"file": str(path), "sha256": card.sha256}
        left_out = ("config", "versions") + (("lora", "parent") if "lora" in card.metadata else ())  # an adapter's base
        known = {name: value for name, value in card.metadata.items() if name not in left_out}
        known = {"stage": None, "parent": parent, "tokenizer_hash": tokenizer_hash(tokenizer), **known}
        save_checkpoint(output, model, known, weights=weights)
    else:
        write_folder(output, model, tokenizer, settings.format, settings.dtype or "float32", card)
    return written


def modelfile(name, tokenizer, config):
    """An Ollama Modelfile for the GGUF `name` in the same folder, with the tokenizer's turns as a Go template."""
    frames, generation_prompt = turn_frames(tokenizer)
    branches = " else ".join(
        f'if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}{{{{' for role, (before, after) in frames.items()
    )
    template = f"{{{{- range .Messages }}}}{{{{ {branches} end }}}}{{{{ end }}}}{generation_prompt}"
    lines = [f"FROM ./{name}", f'TEMPLATE """{template}"""', f"PARAMETER stop {tokenizer.eos_token}"]
    return (
        "\n".join([*lines, f"PARAMETER num_ctx {config.max_seq_len}", "PARAMETER temperature 0.7", "PARAMETER top_k 8"])
        + "\n"
    )
