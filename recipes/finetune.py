"""Fine-tune a model, all of it or by LoRA: `python recipes/finetune.py checkpoint=DIR data.train_path=FILE
[key=value …]`; keys in configs/finetune.yaml.

The data are JSON lines: `{"prompt", "completion"}` or `{"messages"}`, with the loss on what is to be said, or
`{"text"}` documents. On several GPUs: `torchrun --nproc-per-node=8 recipes/finetune.py [key=value …]`.
"""

from rlm_mhc.parallel import first_before_others
from rlm_mhc.train import (
    FinetuneConfig,
    command,
    distributed_session,
    initial_state,
    open_output,
    print_plan,
    run_training,
    with_model,
)


def main(run: FinetuneConfig) -> None:
    """From the first line of the plan to the last checkpoint."""
    with distributed_session(run) as (device, ranks):
        read, tokenizer = run.data.reader(), run.tokenizer
        plan = print_plan(run, device, ranks)
        with open_output(run, ranks) as checkpoint:
            with first_before_others(ranks):
                data = read(run.token_folder, tokenizer, run.model.vocab_size)
            start = initial_state(run, checkpoint, data, device, ranks)
            run_training(run, start, data, plan, ranks, checkpoint)


if __name__ == "__main__":
    command(FinetuneConfig, __file__, main, with_model)
