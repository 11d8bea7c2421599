"""A thin two-stage trainer for vision-language and text-only models: constrained SFT, then Cooling-Weighted DPO."""
