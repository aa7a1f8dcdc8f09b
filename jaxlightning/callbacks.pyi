# Points type checkers and editors at the top-level folder; never shipped.
from callbacks import *
