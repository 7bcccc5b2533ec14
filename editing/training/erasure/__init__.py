"""Other papers' trainings that erase a concept from the weights: each one loss, on the one way to train.

moment.py has what a loss is made of, erasing.py the steps; the methods are a file each.
"""

from .ablation import CA
from .esd import ESD_U, ESD_X
from .fmn import FMN
from .moment import Method
from .sdd import SDD

METHODS: dict[str, Method] = {"ESD-x": ESD_X, "ESD-u": ESD_U, "CA": CA, "SDD": SDD, "FMN": FMN}
