"""transformers' own command line, with the models of this library: `python -m rlm_mhc.model serve DIR` answers requests
as OpenAI's API does, at `http://localhost:8000/v1`.

The command line by itself looks for a checkpoint's class in the module `transformers` alone.
"""

import transformers
from transformers.cli.transformers import main

from rlm_mhc.model import RLMModel

if __name__ == "__main__":
    transformers.RLMModel = RLMModel
    main()
