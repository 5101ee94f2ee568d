"""Take a model elsewhere, and back: Hugging Face folders, GGUF, and a .pth from any of these folders.

    python export_model.py                                   # the latest chat model as a folder with its own code
    python export_model.py --format llama --output my_model  # a stock LlamaForCausalLM: no code of its own
    python export_model.py --format gguf --quantization q8_0 --output my_model/chat.gguf     # llama.cpp, Ollama
    python export_model.py --checkpoint my_model --format pth --output out/back_512.pth
    python export_model.py --lora out/lora_law_512.pth --format pth --output out/law_512.pth    # merged: a whole model

--format minimind     transformers with trust_remote_code=True; trains on there too
         llama        dense models as stock Llama (Mistral where dim is no multiple of n_heads)
         granitemoe   mixtures of experts as stock GraniteMoeShared
         gguf         one file with tokenizer and chat template, and an Ollama Modelfile beside it
         pth          a checkpoint of this project, from a Hugging Face folder of any of the kinds above

Each map is exact: the same logits up to rounding, the same greedy tokens. An export is complete or absent.
"""

from pathlib import Path

from model.cli import add_flags, from_flags, script_parser
from model.errors import run_main
from model.settings import CheckpointSettings, ExportSettings


def parse_arguments():
    parser = script_parser(__doc__)
    add_flags(parser, ExportSettings, "export")
    add_flags(parser, CheckpointSettings, "checkpoint", leave_out=["force"])  # the export's means both
    return parser.parse_args()


def main():
    args = parse_arguments()
    settings = from_flags(ExportSettings, args)

    # Imported after the arguments are read, so that --help answers at once.
    from model.export.card import Card, model_card, read_scores
    from model.export.hub import check_repository, push_to_hub
    from model.export.write import check_output, default_output, write_export
    from model.inference.open import open_model
    from model.lora import named, weights_sha256
    from model.tokenizer import DEFAULT_TOKENIZER_PATH

    # What cannot work is said before the model is loaded.
    if settings.output:
        check_output(settings, Path(settings.output))
    if settings.push_to_hub:
        check_repository(settings.push_to_hub)
    scores = read_scores(settings.scores) if settings.scores else None
    model, tokenizer, path, metadata = open_model(from_flags(CheckpointSettings, args))
    output = Path(settings.output or default_output(settings, args.lora or path))
    check_output(settings, output)

    source = named(path, args.lora)
    card = Card(output.stem, metadata, weights_sha256(path, args.lora), settings.license, scores)
    print(f"{source}: {sum(weight.numel() for weight in model.parameters()):,} parameters -> {settings.format}")
    written = write_export(settings, output, model, tokenizer, source, card)
    for file in written:
        size = sum(part.stat().st_size for part in (file.iterdir() if file.is_dir() else [file]))
        print(f"{file}: {size / 1e6:,.1f} MB")
    if settings.format == "pth" and Path(tokenizer.name_or_path).resolve() != DEFAULT_TOKENIZER_PATH.resolve():
        print(f"its tokenizer: --tokenizer_path {tokenizer.name_or_path}")
    if settings.push_to_hub:
        text = model_card(card, model.config, tokenizer, settings.format) if settings.format == "gguf" else None
        print(push_to_hub(settings.push_to_hub, written, text, settings.private))


if __name__ == "__main__":
    run_main(main)
