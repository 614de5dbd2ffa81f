"""For tests that still say common."""
from conftest import *
