"""What READ and LSTTA share as methods of PEFT: base classes, registration, checks of fields, sharding."""
