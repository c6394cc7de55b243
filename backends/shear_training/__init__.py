"""Training that prunes and repairs: LHSPG, knowledge distribution, recovery; on accelerate, datasets and PEFT."""
