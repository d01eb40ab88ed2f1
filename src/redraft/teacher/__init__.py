"""Teacher-forced passes over stored responses: features, the unroll, simulated acceptance."""
