"""Model cards of READ's and LSTTA's adapters, for a folder and for the Hub.

`overrides.py` puts our card in the places where PEFT and transformers write one, for these adapters alone.
`content.py` gathers what a card says, `base.py` what it says of the base model, `training.py` what a Trainer knows;
the words around it are the templates in `hub_cards/`. `writing.py` writes the file, and is where `describe_adapter`
is; `telling.py` checks what that is told. `page.py` takes a card apart, so that what a person changed stays as it is:
each part (a section, or a field of the metadata) has a checksum in a comment at the card's end, and a part whose
checksum no longer fits is a person's.
"""
