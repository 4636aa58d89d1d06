"""Every configuration key, its type, its default and its meaning, by section of a config.

A section is a frozen, strict pydantic model that refuses unknown keys. A choice (of a method, a data set, ...) is a
discriminated union on `name`. Each union stands at the end of its section's file, and no other list of names exists.
Defaults are the paper's CIFAR-100 setting (arXiv 2210.01708), without augmentation.
"""

# ruff: noqa: F403

from fedpeft_dist.config.schema.algorithm import *
from fedpeft_dist.config.schema.data import *
from fedpeft_dist.config.schema.federation import *
from fedpeft_dist.config.schema.method import *
from fedpeft_dist.config.schema.privacy import *
from fedpeft_dist.config.schema.reparameterized import *
from fedpeft_dist.config.schema.run import *
from fedpeft_dist.config.schema.types import *
