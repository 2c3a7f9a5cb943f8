"""Fine-tune a model, all of it or by LoRA: `python recipes/finetune.py checkpoint=DIR data.train_path=FILE
[key=value …]`; keys in configs/finetune.yaml.

The data are JSON lines: `{"prompt", "completion"}` or `{"messages"}`, with the loss on what is to be said, or
`{"text"}` documents. On several GPUs: `torchrun --nproc-per-node=8 recipes/finetune.py [key=value …]`.
"""

from rlm_mhc.parallel import first_before_others
from rlm_mhc.train import FinetuneConfig, announce, command, conduct, launched, open_output, starting_point, with_model


def main(run: FinetuneConfig) -> None:
    """From the first line of the plan to the last checkpoint."""
    with launched(run) as (device, ranks):
        read, tokenizer = run.data.reader(), run.tokenizer
        plan = announce(run, device, ranks)
        with open_output(run, ranks) as checkpoint:
            with first_before_others(ranks):
                data = read(run.token_folder, tokenizer, run.model.vocab_size)
            start = starting_point(run, checkpoint, data, device, ranks)
            conduct(run, start, data, plan, ranks, checkpoint)


if __name__ == "__main__":
    command(FinetuneConfig, __file__, main, with_model)
