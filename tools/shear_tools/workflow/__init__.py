"""LoRAShear from one end to the other: knowledge, LHSPG, shear, recovery, report; each stage kept in a folder."""
