"""A thin two-stage trainer for vision-language models: constrained SFT, then Cooling-Weighted DPO."""
