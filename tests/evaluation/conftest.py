import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # toy_autoencoder, under any import mode of pytest
