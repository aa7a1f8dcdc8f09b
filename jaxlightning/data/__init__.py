"""Data: loaders with exact positions, and what carries their batches to the devices."""

from ._feed import DeviceBatch as DeviceBatch
from ._feed import Feed as Feed
from ._loader import DataLoader as DataLoader
from ._loader import DataModule as DataModule
from ._loader import abstract as abstract
from ._tokens import TokenFile as TokenFile
