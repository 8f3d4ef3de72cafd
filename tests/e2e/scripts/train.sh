#!/bin/bash
# A program that is no Python: counts, and says who it is.
for step in $(seq 1 40); do
  echo "$step $RANK $$" >> "$PROGRESS"
  sleep 0.04
done
echo "rank $RANK of $WORLD_SIZE finished, argument $1"
