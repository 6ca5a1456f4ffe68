"""Model cards of READ's and LSTTA's adapters, for a folder and for the Hub."""
