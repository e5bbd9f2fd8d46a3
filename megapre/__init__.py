"""megapre pretrains large language models: raw text to tokens to a trained, sampled model."""

__version__ = "0.1.0"
