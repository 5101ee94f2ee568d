"""The table of training stages: what each is run by, reads, starts from and is called. Imports nothing heavy."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """One training stage. `name` is its checkpoint's path in out/ without dim, `parents` the stages it may start from,
    the best one first. is_adapter: its checkpoint is no whole model, and another name of it is added."""

    name: str
    command: str
    data_path: str
    parents: tuple = ()
    is_adapter: bool = False


CHATS = ("multi_chat/full_sft", "single_chat/full_sft")
STAGES = {
    stage.name: stage
    for stage in (
        Stage("pretrain", "1-pretrain.py", "dataset/pretrain_data.csv"),
        Stage("single_chat/full_sft", "3-full_sft.py", "dataset/sft_data_single.csv", ("pretrain",)),
        Stage("multi_chat/full_sft", "3-full_sft.py --multi", "dataset/sft_data.csv", ("single_chat/full_sft",)),
        Stage("lora", "4-lora_sft.py", "dataset/sft_data.csv", CHATS, is_adapter=True),
        Stage("dpo", "5-dpo_train.py", "dataset/dpo/train_data.json", CHATS),
    )
}
PRETRAINED_STAGES = tuple(name for name, stage in STAGES.items() if not stage.parents)
# They answer; the last one first.
CHAT_STAGES = tuple(name for name, stage in reversed(STAGES.items()) if stage.parents and not stage.is_adapter)
