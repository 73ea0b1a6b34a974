"""moetrace: which experts does this Mixture-of-Experts model really use?"""

__version__ = "0.1.0"
