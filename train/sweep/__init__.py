"""The MedBLIP paper's Table 1 for any checkpoint. Start at sweep.py."""
