"""What ``import shear_ir`` offers: trace, plan, shear, verify, save, repair."""
