"""The `runtime` and `output` sections: the machine and the files."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fedpeft_dist.config.paths import RunName, UserPath, check_run_place
from fedpeft_dist.config.schema.types import Count, Section


class RuntimeConfig(Section):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Type of the computation; auto: bf16 on CUDA, fp32 on the CPU."""
    lanes: Literal["auto"] | Count = "auto"
    """Clients that a rank trains side by side; auto: as many as its share of the cohort needs and memory allows."""
    threads: Count = 1
    """CPU threads of each rank."""
    compile: bool = False
    """Compile the model with torch.compile, which may round differently; not for method full."""
    evaluate_batch: Count = 256


class OutputConfig(Section):
    root: UserPath = "runs"
    """Folder of all runs, relative to the folder that the command runs in."""
    name: RunName | None = None
    """The run's directory below `root`, such as `lora4` or `ablation/lora4`; null derives it from the config's path and
    content."""
    checkpoint_every: Annotated[int, Field(ge=0)] = 1
    """Rounds between two checkpoints; 0 writes one at the end only."""

    @model_validator(mode="after")
    def _place_leaves_room(self) -> "OutputConfig":
        check_run_place(self.root, self.name)
        return self
