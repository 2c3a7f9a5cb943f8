"""Train a language model from text: `python recipes/pretrain_1b.py [key=value …]`; keys in configs/pretrain_1b.yaml.

On several GPUs: `torchrun --nproc-per-node=8 recipes/pretrain_1b.py [key=value …]`, or under SLURM
`srun --ntasks-per-node=8 python recipes/pretrain_1b.py [key=value …]`.
"""

from rlm_mhc.parallel import first_before_others
from rlm_mhc.train import RunConfig, command, distributed_session, initial_state, open_output, print_plan, run_training


def main(run: RunConfig) -> None:
    """From the first line of the plan to the last checkpoint."""
    with distributed_session(run) as (device, ranks):
        read = run.data.reader()
        plan = print_plan(run, device, ranks)
        with open_output(run, ranks) as checkpoint:
            # A tokenizer trained anew on other data would give the same ids to other words.
            tokenizer = str(checkpoint) if checkpoint and run.tokenizer == "auto" else run.tokenizer
            with first_before_others(ranks):
                data = read(run.token_folder, tokenizer, run.model.vocab_size)
            start = initial_state(run, checkpoint, data, device, ranks)
            run_training(run, start, data, plan, ranks, checkpoint)


if __name__ == "__main__":
    command(RunConfig, __file__, main)
