"""Networks: arrays in, arrays out; they know nothing of noise, time laws or losses."""
