//! Will run GPT-OSS, ACE-Step and Matrix-Game 2 on Burn from the weights that `formats` has verified. Empty so far.
